// Package keytest is the suite that every room of keyclient passes, with fakes where the real service can't show a
// fault. It is imported by tests only and does not know how a room works inside.
package keytest

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"voldek/internal/exit"
	"voldek/keyclient"
)

// Room is one kind of key service to the suite.
type Room struct {
	// Known leads to Key, Missing to nothing, Denied to a key that the client may not have.
	Known, Missing, Denied keyclient.Ref
	Key                    []byte
	// Open makes a client. A room of the network dials with n.Dial and talks to what n serves. The suite closes it.
	Open func(t *testing.T, n *Network) *keyclient.Clients
	// Service is nil for a room without a network.
	Service *Service
}

// Service is the other side of a room that speaks HTTP.
type Service struct {
	New       func() http.Handler // a service that holds the key, for Known, Missing and Denied
	Addresses []string            // where it is served
	Canaries  []string            // what must not stand in an error, beside the key
	// Steps name the requests that one fetch makes. A fault is tried on each.
	Steps map[string]func(*http.Request) bool
}

// timeout is the caller's deadline in all faults.
const timeout = 30 * time.Second

// Run runs the suite on a room.
func Run(t *testing.T, room Room) {
	t.Run("known key", func(t *testing.T) {
		room.try(t, nil, func(t *testing.T, o outcome) {
			if o.err != nil || !bytes.Equal(o.key, room.Key) {
				t.Errorf("got %d bytes, %v", len(o.key), o.err)
			}
		})
	})
	for name, c := range map[string]struct {
		ref  keyclient.Ref
		want exit.Code
	}{"missing key": {room.Missing, exit.NoKey}, "denied key": {room.Denied, exit.Denied}} {
		t.Run(name, func(t *testing.T) {
			other := room
			other.Known = c.ref
			other.try(t, nil, func(t *testing.T, o outcome) {
				if exit.Of(o.err) != c.want || o.took > time.Second {
					t.Errorf("code %d after %s: %v", exit.Of(o.err), o.took, o.err)
				}
			})
		})
	}
	if room.Service == nil {
		return
	}
	t.Run("service down", func(t *testing.T) {
		other := room
		service := *room.Service
		service.Addresses = nil
		other.Service = &service
		other.try(t, nil, wantUnreached("connection refused"))
	})
	for step, is := range room.Service.Steps {
		for _, f := range faults() {
			t.Run(step+"/"+f.name, func(t *testing.T) {
				room.try(t, &f.onStep, f.check, is)
			})
		}
		t.Run(step+"/cancelled", func(t *testing.T) { room.cancelled(t, is) })
	}
}

// outcome is what became of one fetch.
type outcome struct {
	key   []byte
	err   error
	took  time.Duration // by the bubble's clock
	asked int           // requests of the faulty step
	other bool          // somebody dialled the host that a redirect named
}

// try makes one fetch of Known in a bubble of its own, with the fault on the requests for which is is true.
func (room Room) try(t *testing.T, fault *onStep, check func(*testing.T, outcome), is ...func(*http.Request) bool) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), timeout)
		defer cancel()
		check(t, room.fetch(t, ctx, fault, is...))
	})
}

func (room Room) fetch(t *testing.T, ctx context.Context, fault *onStep, is ...func(*http.Request) bool) (o outcome) {
	n := NewNetwork()
	counted := &counter{}
	if room.Service != nil {
		h := room.Service.New()
		if fault != nil {
			h = counted.wrap(h, *fault, is[0])
		}
		for _, address := range room.Service.Addresses {
			defer n.Serve(address, h)()
		}
	}
	c := room.Open(t, n)
	defer c.Close()
	start := time.Now()
	key, err := c.Fetch(ctx, room.Known, keyclient.Volume{Name: "suite"})
	o = outcome{err: err, took: time.Since(start), asked: counted.count(), other: n.Dialled(elsewhere)}
	if err == nil {
		o.key = bytes.Clone(key.Bytes())
		key.Wipe()
	}
	room.searchForCanaries(t, err)
	return o
}

func (room Room) searchForCanaries(t *testing.T, err error) {
	if err == nil {
		return
	}
	canaries := []string{"canary", string(room.Key), hex.EncodeToString(room.Key), base64.StdEncoding.EncodeToString(room.Key)}
	if room.Service != nil {
		canaries = append(canaries, room.Service.Canaries...)
	}
	for _, text := range []string{err.Error(), fmt.Sprintf("%+v %#v %q", err, err, err)} {
		for _, canary := range canaries {
			if strings.Contains(text, canary) {
				t.Errorf("a secret is in the error: %s", text)
			}
		}
	}
}

// cancelled is a caller who goes away while the service is silent: Interrupted, at once, and not "not reached".
func (room Room) cancelled(t *testing.T, is func(*http.Request) bool) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(2*time.Second, cancel)
		o := room.fetch(t, ctx, &onStep{silent}, is)
		if exit.Of(o.err) != exit.Interrupted || o.took != 2*time.Second {
			t.Errorf("after %s: %v", o.took, o.err)
		}
	})
}

// counter counts the requests of the faulty step.
type counter struct {
	mu sync.Mutex
	n  int
}

func (c *counter) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n
}

func (c *counter) wrap(next http.Handler, fault onStep, is func(*http.Request) bool) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !is(r) {
			next.ServeHTTP(w, r)
			return
		}
		c.mu.Lock()
		c.n++
		n := c.n
		c.mu.Unlock()
		fault.answer(w, r, n, next)
	})
}
