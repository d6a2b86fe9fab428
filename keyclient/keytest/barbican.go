package keytest

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"

	"voldek/keyclient"
	"voldek/keyclient/file"
)

// FakeSecret is a secret of FakeBarbican.
type FakeSecret struct {
	Type    string // secret_type
	Payload []byte // nil: none
	Private bool   // of another project: 403
}

// FakeBarbican is a Keystone and a Barbican in one handler, for the faults that the real ones can't be made to show and
// for counting requests. It checks the password, the token, methods, paths and the Accept header.
//
// It does not check roles, scopes, ACLs, expiry, microversions, sizes, or the form of what is sent beyond what it reads,
// and stores nothing. What a Barbican really answers is tested against a real one.
type FakeBarbican struct {
	Secrets map[string]FakeSecret // by id; not to be changed while served

	mu     sync.Mutex
	logins int
}

// The addresses of the fake on a Network, and its one user.
const (
	FakeKeystoneAddress = "keystone.test:5000"
	FakeBarbicanAddress = "barbican.test:9311"
	FakeUser            = "fake-user"
	FakePassword        = "canary-fake-password"
)

// Service is the configuration of a client of the fake.
func (f *FakeBarbican) Service(password file.Source) keyclient.Service {
	return keyclient.Service{Type: keyclient.TypeBarbican, AuthURL: "http://" + FakeKeystoneAddress + "/v3",
		Username: FakeUser, Project: "fake-project", Password: password, Insecure: true}
}

// Logins returns how many tokens were given out.
func (f *FakeBarbican) Logins() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.logins
}

// token is the one that is taken: only the last that was given out.
func (f *FakeBarbican) token() string { return fmt.Sprintf("canary-fake-token-%d", f.logins) }

// ServeHTTP answers for both services.
func (f *FakeBarbican) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.URL.Path == "/v3/auth/tokens" {
		f.login(w, r)
		return
	}
	w.Header().Set("X-Openstack-Request-Id", "req-fake")
	id, part, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v1/secrets/"), "/")
	s, known := f.Secrets[id]
	switch {
	case r.Header.Get("X-Auth-Token") != f.token() || f.logins == 0:
		http.Error(w, "canary: who are you", http.StatusUnauthorized)
	case r.Method != http.MethodGet:
		http.Error(w, "canary: method", http.StatusMethodNotAllowed)
	case !known, part == "payload" && s.Payload == nil:
		http.Error(w, "canary: no such secret", http.StatusNotFound)
	case s.Private:
		http.Error(w, "canary: not yours", http.StatusForbidden)
	case part == "" && r.Header.Get("Accept") == "application/json":
		meta := map[string]any{"secret_type": s.Type, "status": "ACTIVE"}
		if s.Payload != nil {
			meta["content_types"] = map[string]string{"default": "application/octet-stream"}
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(meta)
	case part == "payload" && r.Header.Get("Accept") == "application/octet-stream":
		w.Header().Set("Content-Type", "application/octet-stream")
		_, _ = w.Write(s.Payload)
	default:
		http.Error(w, "canary: accept", http.StatusNotAcceptable)
	}
}

func (f *FakeBarbican) login(w http.ResponseWriter, r *http.Request) {
	var body struct {
		Auth struct {
			Identity struct {
				Password struct {
					User struct{ Name, Password string }
				}
			}
		}
	}
	err := json.NewDecoder(r.Body).Decode(&body)
	user := body.Auth.Identity.Password.User
	if err != nil || r.Method != http.MethodPost || user.Name != FakeUser || user.Password != FakePassword {
		http.Error(w, "canary: wrong password "+user.Password, http.StatusUnauthorized)
		return
	}
	f.logins++
	w.Header().Set("X-Subject-Token", f.token())
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusCreated)
	_, _ = fmt.Fprintf(w, `{"token":{"user":{"id":"fake-user-id"},"catalog":[{"type":"key-manager","endpoints":[
		{"interface":"public","region_id":"R","url":"http://%s"}]}]}}`, FakeBarbicanAddress)
}
