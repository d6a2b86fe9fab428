package keytest

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"voldek/internal/exit"
)

// elsewhere is the address that hostile redirects name: the metadata service of most clouds.
const elsewhere = "169.254.169.254:80"

// onStep answers the n-th request (from 1) of the faulty step.
type onStep struct {
	answer func(w http.ResponseWriter, r *http.Request, n int, next http.Handler)
}

// fault is one way in which a service goes wrong, and what a client must make of it.
type fault struct {
	name string
	onStep
	check func(*testing.T, outcome)
}

func faults() []fault {
	all := []fault{
		{"accepts and is silent", onStep{silent}, wantUnreached("no answer in time")},
		{"headers, then silent", onStep{half}, wantUnreached("no answer in time")},
		{"a byte a second", onStep{drip}, wantUnreached("no answer in time")},
		{"silent once, then well", onStep{thenWell(1, silent)}, wantWait(5*time.Second, 6*time.Second)},
		{"a byte a second once, then well", onStep{thenWell(1, drip)}, wantWait(5*time.Second, 6*time.Second)},
		{"not HTTP", onStep{raw}, wantUnreached("the answer is not HTTP")},
		{"closes the connection", onStep{hangUp}, wantUnreached("connection closed")},
		{"always 503", onStep{always(http.StatusServiceUnavailable)}, wantUnreached("HTTP 503")},
		{"429, Retry-After 7", onStep{busyUntil("7")}, wantWait(7*time.Second, 8*time.Second)},
		{"503, Retry-After a date", onStep{busyUntil("date")}, wantWait(9*time.Second, 11*time.Second)},
		{"429, Retry-After past the deadline", onStep{busyUntil("3600")}, wantEarlyEnd},
		{"redirect to another host", onStep{redirect("http://" + elsewhere + "/latest/meta-data")}, wantNoRedirect},
		{"redirect to another scheme", onStep{redirect("gopher://x")}, wantNoRedirect},
		{"redirects in a circle", onStep{circle}, wantFinal(exit.Failed)},
		{"a body without end", onStep{endless}, wantFinal(exit.Failed)},
		{"HTML and 200", onStep{html}, wantFinal(exit.Failed)},
		{"breaks off, then well", onStep{thenWell(2, breakOff)}, wantTries(3)},
	}
	for _, code := range []int{408, 429, 500, 502, 503, 504} {
		all = append(all, fault{fmt.Sprintf("%d twice, then well", code), onStep{thenWell(2, always(code))}, wantTries(3)})
	}
	for _, code := range []int{400, 402, 403, 404, 405, 409, 410, 422} {
		all = append(all, fault{fmt.Sprintf("always %d", code), onStep{always(code)}, wantFinal(refused(code))})
	}
	return all
}

// refused is the code that must come of a status, or -1 where that depends on the step.
func refused(status int) exit.Code {
	switch status {
	case http.StatusForbidden:
		return exit.Denied
	case http.StatusNotFound:
		return -1
	}
	return exit.Failed
}

func silent(_ http.ResponseWriter, r *http.Request, _ int, _ http.Handler) { <-r.Context().Done() }

func half(w http.ResponseWriter, r *http.Request, _ int, _ http.Handler) {
	w.Header().Set("Content-Type", r.Header.Get("Accept"))
	w.Header().Set("Content-Length", "100")
	w.WriteHeader(okFor(r))
	_ = http.NewResponseController(w).Flush()
	<-r.Context().Done()
}

func drip(w http.ResponseWriter, r *http.Request, _ int, _ http.Handler) {
	w.Header().Set("Content-Type", r.Header.Get("Accept"))
	w.WriteHeader(okFor(r))
	for r.Context().Err() == nil {
		if _, err := w.Write([]byte(" ")); err != nil {
			return
		}
		_ = http.NewResponseController(w).Flush()
		select {
		case <-time.After(time.Second):
		case <-r.Context().Done():
		}
	}
}

func hangUp(http.ResponseWriter, *http.Request, int, http.Handler) { panic(http.ErrAbortHandler) }

func breakOff(w http.ResponseWriter, r *http.Request, _ int, _ http.Handler) {
	w.Header().Set("Content-Type", r.Header.Get("Accept"))
	w.Header().Set("Content-Length", "100")
	w.WriteHeader(okFor(r))
	_, _ = w.Write([]byte(`{"half":`))
	panic(http.ErrAbortHandler)
}

func always(code int) func(http.ResponseWriter, *http.Request, int, http.Handler) {
	return func(w http.ResponseWriter, _ *http.Request, _ int, _ http.Handler) { http.Error(w, "no", code) }
}

func thenWell(bad int, answer func(http.ResponseWriter, *http.Request, int, http.Handler)) func(http.ResponseWriter, *http.Request, int, http.Handler) {
	return func(w http.ResponseWriter, r *http.Request, n int, next http.Handler) {
		if n <= bad {
			answer(w, r, n, next)
			return
		}
		next.ServeHTTP(w, r)
	}
}

func busyUntil(retryAfter string) func(http.ResponseWriter, *http.Request, int, http.Handler) {
	return thenWell(1, func(w http.ResponseWriter, _ *http.Request, _ int, _ http.Handler) {
		code := http.StatusTooManyRequests
		if retryAfter == "date" {
			code = http.StatusServiceUnavailable
			w.Header().Set("Retry-After", time.Now().Add(10*time.Second).UTC().Format(http.TimeFormat))
		} else {
			w.Header().Set("Retry-After", retryAfter)
		}
		http.Error(w, "busy", code)
	})
}

func redirect(to string) func(http.ResponseWriter, *http.Request, int, http.Handler) {
	return func(w http.ResponseWriter, _ *http.Request, _ int, _ http.Handler) {
		w.Header().Set("Location", to)
		w.WriteHeader(http.StatusTemporaryRedirect)
	}
}

func circle(w http.ResponseWriter, r *http.Request, _ int, _ http.Handler) {
	w.Header().Set("Location", r.URL.Path)
	w.WriteHeader(http.StatusTemporaryRedirect)
}

// endless would fill the memory of a client that reads it all; that one is left to wait after 16 MiB.
func endless(w http.ResponseWriter, r *http.Request, _ int, _ http.Handler) {
	w.Header().Set("Content-Type", r.Header.Get("Accept"))
	w.WriteHeader(okFor(r))
	_, _ = w.Write([]byte(`{"token":"`))
	piece := []byte(strings.Repeat("x", 32<<10))
	for range 16 << 20 / len(piece) {
		if _, err := w.Write(piece); err != nil {
			return
		}
	}
	<-r.Context().Done()
}

// raw sends the secret itself where a status line belongs, which net/http quotes in its error.
func raw(w http.ResponseWriter, _ *http.Request, _ int, _ http.Handler) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	_, _ = conn.Write([]byte("canary canary canary\r\n\r\n"))
	_ = conn.Close()
}

// html is what a portal or a proxy says in the service's place.
func html(w http.ResponseWriter, r *http.Request, _ int, _ http.Handler) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.WriteHeader(okFor(r))
	_, _ = w.Write([]byte("<html>canary: please log in</html>"))
}

// okFor is the status that the step's client takes for a success.
func okFor(r *http.Request) int {
	if r.Method == http.MethodPost {
		return http.StatusCreated
	}
	return http.StatusOK
}

// wantUnreached: tried until the deadline, not longer, and the error names the cause.
func wantUnreached(cause string) func(*testing.T, outcome) {
	return func(t *testing.T, o outcome) {
		if exit.Of(o.err) != exit.Unreached || !strings.Contains(fmt.Sprint(o.err), cause) {
			t.Errorf("want not reached, %s: %v", cause, o.err)
		}
		if o.took < timeout-5*time.Second || o.took > timeout+time.Second {
			t.Errorf("took %s of %s", o.took, timeout)
		}
	}
}

func wantTries(n int) func(*testing.T, outcome) {
	return func(t *testing.T, o outcome) {
		if o.err != nil || o.asked != n || o.took > timeout {
			t.Errorf("want success at attempt %d: %d attempts in %s, %v", n, o.asked, o.took, o.err)
		}
	}
}

func wantWait(least, most time.Duration) func(*testing.T, outcome) {
	return func(t *testing.T, o outcome) {
		wantTries(2)(t, o)
		if o.took < least || o.took > most {
			t.Errorf("waited %s, want %s to %s", o.took, least, most)
		}
	}
}

func wantEarlyEnd(t *testing.T, o outcome) {
	if exit.Of(o.err) != exit.Unreached || o.asked != 1 || o.took > time.Second {
		t.Errorf("%d attempts in %s: %v", o.asked, o.took, o.err)
	}
}

// wantFinal: one attempt, at once. A code of -1 is any but Unreached.
func wantFinal(code exit.Code) func(*testing.T, outcome) {
	return func(t *testing.T, o outcome) {
		got := exit.Of(o.err)
		if got != code && (code != -1 || got == exit.Unreached || got == exit.OK) {
			t.Errorf("code %d, want %d: %v", got, code, o.err)
		}
		if o.asked > 4 || o.took > time.Second || o.asked != 1 && !strings.Contains(fmt.Sprint(o.err), "redirect") {
			t.Errorf("%d attempts in %s", o.asked, o.took)
		}
	}
}

func wantNoRedirect(t *testing.T, o outcome) {
	wantFinal(exit.Failed)(t, o)
	if o.other {
		t.Error("the other host was dialled")
	}
}
