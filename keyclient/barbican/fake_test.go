package barbican_test

import (
	"context"
	"encoding/hex"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"voldek/internal/exit"
	"voldek/keyclient"
	"voldek/keyclient/keytest"
)

const (
	knownID   = "00000000-0000-4000-8000-000000000001"
	missingID = "00000000-0000-4000-8000-000000000002"
	deniedID  = "00000000-0000-4000-8000-000000000003"
)

var canaryKey = []byte("canary-key-of-32-bytes-in-plain!")

func newFake() *keytest.FakeBarbican {
	return &keytest.FakeBarbican{Secrets: map[string]keytest.FakeSecret{
		knownID:  {Type: "symmetric", Payload: canaryKey},
		deniedID: {Type: "symmetric", Payload: canaryKey, Private: true},
	}}
}

func openFake(t *testing.T, n *keytest.Network) *keyclient.Clients {
	return open(t, newFake().Service(stored(t, keytest.FakePassword)), keyclient.WithDial(n.Dial))
}

func ref(id string) keyclient.Ref { return keyclient.Ref{Scheme: keyclient.SchemeBarbican, ID: id} }

func TestConformance(t *testing.T) {
	keytest.Run(t, keytest.Room{
		Known: ref(knownID), Missing: ref(missingID), Denied: ref(deniedID),
		Key:  []byte(hex.EncodeToString(canaryKey)),
		Open: openFake,
		Service: &keytest.Service{
			New:       func() http.Handler { return newFake() },
			Addresses: []string{keytest.FakeKeystoneAddress, keytest.FakeBarbicanAddress},
			Canaries:  []string{"canary"},
			Steps: map[string]func(*http.Request) bool{
				"login":    func(r *http.Request) bool { return r.URL.Path == "/v3/auth/tokens" },
				"metadata": func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, knownID) },
				"payload":  func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, "/payload") },
			},
		},
	})
}

// serve puts the handler in both places of the network.
func serve(n *keytest.Network, h http.Handler) (stop func()) {
	keystone, barbican := n.Serve(keytest.FakeKeystoneAddress, h), n.Serve(keytest.FakeBarbicanAddress, h)
	return func() { keystone(); barbican() }
}

func TestOneLoginForManyVolumes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake, n := newFake(), keytest.NewNetwork()
		defer serve(n, fake)()
		c := openFake(t, n)
		defer c.Close()
		var all sync.WaitGroup
		for range 200 {
			all.Go(func() {
				if _, err := fetch(t, c, "barbican:"+knownID); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if fake.Logins() != 1 {
			t.Errorf("%d logins for 200 fetches", fake.Logins())
		}
	})
}

// A wrong password is tried once for all that wait, or the account would be locked.
func TestWrongPasswordIsTriedOnceForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake, n := newFake(), keytest.NewNetwork()
		tries := 0
		all := make(chan struct{})
		defer serve(n, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			tries++
			<-all
			fake.ServeHTTP(w, r)
		}))()
		c := open(t, fake.Service(stored(t, "canary-wrong")), keyclient.WithDial(n.Dial))
		defer c.Close()
		var waiting sync.WaitGroup
		for range 50 {
			waiting.Go(func() {
				_, err := fetch(t, c, "barbican:"+knownID)
				if exit.Of(err) != exit.Denied || strings.Contains(err.Error(), "canary") {
					t.Errorf("got %v", err)
				}
			})
		}
		synctest.Wait()
		close(all)
		waiting.Wait()
		if tries != 1 {
			t.Errorf("%d login requests", tries)
		}
	})
}

// The caller that logs in for others may run out of time; then another one does.
func TestLoginPassesOnWhenItsCallerGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake, n := newFake(), keytest.NewNetwork()
		open := make(chan struct{})
		defer serve(n, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			select {
			case <-open:
				fake.ServeHTTP(w, r)
			default:
				http.Error(w, "not yet", http.StatusServiceUnavailable)
			}
		}))()
		c := openFake(t, n)
		defer c.Close()
		impatient, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		var both sync.WaitGroup
		both.Go(func() {
			if _, err := c.Fetch(impatient, ref(knownID), keyclient.Volume{}); exit.Of(err) != exit.Unreached {
				t.Errorf("impatient: %v", err)
			}
		})
		synctest.Wait()
		both.Go(func() {
			if _, err := fetch(t, c, "barbican:"+knownID); err != nil {
				t.Errorf("patient: %v", err)
			}
		})
		time.Sleep(4 * time.Second)
		close(open)
		both.Wait()
	})
}

func TestRefusedTokenIsRenewedOnce(t *testing.T) {
	for name, c := range map[string]struct {
		refusals int
		logins   int
		want     exit.Code
	}{"expired": {1, 2, exit.OK}, "never taken": {1000, 2, exit.Denied}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fake, n := newFake(), keytest.NewNetwork()
				refused := 0
				defer serve(n, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if strings.HasSuffix(r.URL.Path, "/payload") && refused < c.refusals {
						refused++
						w.WriteHeader(http.StatusUnauthorized)
						return
					}
					fake.ServeHTTP(w, r)
				}))()
				client := openFake(t, n)
				defer client.Close()
				_, err := fetch(t, client, "barbican:"+knownID)
				if exit.Of(err) != c.want || fake.Logins() != c.logins {
					t.Errorf("%d logins, %v", fake.Logins(), err)
				}
			})
		})
	}
}

func TestPayloadsThatAreNoKey(t *testing.T) {
	wrapped := `{"stackit_kms_%s_id":"p","stackit_kms_region":"eu01","stackit_service_account":"a",` +
		`"stackit_kms_key_version":"1","data":"Y2FuYXJ5"}`
	for name, c := range map[string]struct {
		secret keytest.FakeSecret
		want   exit.Code
		text   string
	}{
		"STACKIT, as it is specified": {keytest.FakeSecret{Type: "symmetric",
			Payload: []byte(strings.Replace(wrapped, "%s", "project", 1))}, exit.Failed, "still wrapped by STACKIT KMS"},
		"STACKIT, as it is misspelt": {keytest.FakeSecret{Type: "passphrase",
			Payload: []byte("\n " + strings.Replace(wrapped, "%s", "protect", 1))}, exit.Failed, "still wrapped by STACKIT KMS"},
		"empty":       {keytest.FakeSecret{Type: "symmetric", Payload: []byte{}}, exit.NoKey, "the payload is empty"},
		"none":        {keytest.FakeSecret{Type: "symmetric"}, exit.NoKey, "has no payload"},
		"certificate": {keytest.FakeSecret{Type: "certificate", Payload: []byte("canary")}, exit.Failed, "is a certificate"},
		"largest":     {keytest.FakeSecret{Type: "symmetric", Payload: make([]byte, 64<<10)}, exit.OK, ""},
		"too long":    {keytest.FakeSecret{Type: "symmetric", Payload: make([]byte, 64<<10+1)}, exit.Failed, "too long"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fake, n := newFake(), keytest.NewNetwork()
				fake.Secrets[knownID] = c.secret
				defer serve(n, fake)()
				client := openFake(t, n)
				defer client.Close()
				_, err := fetch(t, client, "barbican:"+knownID)
				if exit.Of(err) != c.want || err != nil && !strings.Contains(err.Error(), c.text) {
					t.Errorf("code %d, want %d: %v", exit.Of(err), c.want, err)
				}
				if err != nil && (strings.Contains(err.Error(), "canary") || strings.Contains(err.Error(), "Y2Fu")) {
					t.Errorf("a secret is in the error: %v", err)
				}
			})
		})
	}
}

func TestCatalogueMayNotLeadToPlainHTTP(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake, n := newFake(), keytest.NewNetwork()
		defer serve(n, fake)()
		s := fake.Service(stored(t, keytest.FakePassword))
		s.Insecure = false
		if _, err := keyclient.New(keyclient.Config{Services: map[string]keyclient.Service{"os": s}}); exit.Of(err) != exit.Usage {
			t.Errorf("http:// in the configuration: %v", err)
		}
	})
}

// FuzzBarbicanResponse lets a service answer the three requests of a fetch with anything.
func FuzzBarbicanResponse(f *testing.F) {
	f.Add(200, "application/json", []byte(`{"secret_type":"symmetric","content_types":{"default":"x"}}`), "", uint8(1))
	f.Add(201, "application/json", []byte(`{"token":{"user":{"id":"u"},"catalog":[]}}`), "t", uint8(0))
	f.Add(201, "application/json", []byte(`{"token":null}`), "t", uint8(0))
	f.Add(200, "application/octet-stream", []byte(`{"stackit_kms_project_id":1}`), "", uint8(2))
	f.Add(403, "text/html", []byte("<html>"), "req-\x1b[2J", uint8(2))
	f.Add(302, "", []byte("/"), "", uint8(1))
	f.Fuzz(func(t *testing.T, code int, contentType string, body []byte, header string, step uint8) {
		synctest.Test(t, func(t *testing.T) {
			fake, n := newFake(), keytest.NewNetwork()
			asked := 0
			defer serve(n, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if asked++; asked-1 != int(step%3) {
					fake.ServeHTTP(w, r)
					return
				}
				w.Header().Set("Content-Type", contentType)
				for _, name := range []string{"X-Subject-Token", "X-Openstack-Request-Id", "Retry-After", "Location"} {
					w.Header().Set(name, header)
				}
				w.WriteHeader(200 + (code%400+400)%400)
				_, _ = w.Write(body)
			}))()
			c := openFake(t, n)
			defer c.Close()
			key, err := fetch(t, c, "barbican:"+knownID)
			switch {
			case err == nil && key == "":
				t.Error("an empty key without an error")
			case err != nil && strings.Contains(err.Error(), "canary"):
				t.Errorf("a secret is in the error: %v", err)
			case err != nil && strings.ContainsFunc(err.Error(), func(r rune) bool { return r < ' ' || r == 0x7f }):
				t.Errorf("control characters are in the error: %q", err)
			}
		})
	})
}
