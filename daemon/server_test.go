package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"mime/multipart"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"voldek/daemon/api"
	"voldek/daemon/client"
	"voldek/internal/exit"
	"voldek/internal/secret"
)

// serveFake serves an engine with a fake host on a real socket and returns its client.
func serveFake(t *testing.T, h *fakeHost) *client.Client {
	engine := h.engine()
	server := NewServer(engine, NoGroup, slog.New(slog.NewTextHandler(io.Discard, nil)))
	socket := filepath.Join(h.dir, "socket")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	t.Cleanup(func() {
		engine.Stop(context.Background())
		_ = server.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return client.New(socket)
}

func TestClientAndServer(t *testing.T) {
	h := newFakeHost(t)
	c := serveFake(t, h)
	v, err := c.Attach(t.Context(), request(h, "data", "a", "right"), nil)
	if err != nil || v.State != api.Open || v.Export == "" {
		t.Fatalf("%+v %v", v, err)
	}
	list, err := c.List(t.Context())
	if err != nil || len(list) != 1 || list[0].Name != "data" {
		t.Errorf("%+v %v", list, err)
	}
	if _, err := c.Status(t.Context(), "none"); exit.Of(err) != exit.NoDevice {
		t.Errorf("status of nothing: %v", err)
	}
	if v, err := c.Detach(t.Context(), "data"); err != nil || v.State != api.Detached {
		t.Errorf("%+v %v", v, err)
	}
	if _, err := c.Attach(t.Context(), request(h, "data", "a", "wrong"), nil); exit.Of(err) != exit.WrongKey {
		t.Errorf("wrong key: %v", err)
	}
}

func TestTheKeyPassesBesideTheJSON(t *testing.T) {
	h := newFakeHost(t)
	c := serveFake(t, h)
	r := request(h, "data", "a")
	r.Keys = []string{"-"}
	if _, err := c.Attach(t.Context(), r, nil); exit.Of(err) != exit.Usage {
		t.Errorf("without a key: %v", err)
	}
	key, err := secret.FromBytes([]byte("right"))
	if err != nil {
		t.Fatal(err)
	}
	defer key.Wipe()
	if _, err := c.Attach(t.Context(), r, key); err != nil {
		t.Error(err)
	}
}

func TestEventsTellEveryState(t *testing.T) {
	h := newFakeHost(t)
	c := serveFake(t, h)
	h.gate = make(chan struct{})
	go func() { _, _ = c.Attach(t.Context(), request(h, "data", "a", "right"), nil) }()
	<-h.fetching
	var states []api.State
	err := c.Watch(t.Context(), func(e api.Event) error {
		if states = append(states, e.State); len(states) == 1 {
			close(h.gate) // the watch is there: nothing can be missed
		}
		if e.State == api.Open {
			return io.EOF
		}
		return nil
	})
	if want := []api.State{api.Fetching, api.Unlocking, api.Open}; err != io.EOF || !slices.Equal(states, want) {
		t.Errorf("%v, want %v: %v", states, want, err)
	}
}

func TestRequestsThatAreRefused(t *testing.T) {
	h := newFakeHost(t)
	engine := h.engine()
	defer engine.Stop(t.Context())
	server := NewServer(engine, NoGroup, slog.New(slog.NewTextHandler(io.Discard, nil)))
	device := h.device("a")
	for _, c := range []struct{ name, path, contentType, body string }{
		{"no body", "data", "application/json", ""},
		{"no object", "data", "application/json", "[]"},
		{"unknown field", "data", "application/json", fmt.Sprintf(`{"name":"data","device":%q,"keys":["file:/k"],"formt":1}`, device)},
		{"two objects", "data", "application/json", fmt.Sprintf(`{"name":"data","device":%q,"keys":["file:/k"]} {}`, device)},
		{"another name", "other", "application/json", fmt.Sprintf(`{"name":"data","device":%q,"keys":["file:/k"]}`, device)},
		{"no keys", "data", "application/json", fmt.Sprintf(`{"name":"data","device":%q}`, device)},
		{"bad reference", "data", "application/json", fmt.Sprintf(`{"name":"data","device":%q,"keys":["x"]}`, device)},
		{"bad name", "..", "application/json", fmt.Sprintf(`{"name":"..","device":%q,"keys":["file:/k"]}`, device)},
		{"endless timeout", "data", "application/json", fmt.Sprintf(`{"name":"data","device":%q,"keys":["file:/k"],"timeout":1e300}`, device)},
		{"too long", "data", "application/json", `{"name":"` + strings.Repeat("a", api.MaxRequest) + `"}`},
		{"no type", "data", "", "{}"},
		{"another type", "data", "text/plain", "{}"},
		{"multipart without parts", "data", "multipart/form-data; boundary=x", "--x--"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := httptest.NewRequest("PUT", "/v1/volumes/x", strings.NewReader(c.body))
			r.SetPathValue("name", c.path)
			r.Header.Set("Content-Type", c.contentType)
			w := httptest.NewRecorder()
			server.attach(w, r)
			var answer api.Answer
			if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil {
				t.Fatal(err)
			}
			if answer.Error == nil || answer.Error.Exit != exit.Usage || w.Code != http.StatusBadRequest {
				t.Errorf("status %d, %s", w.Code, w.Body)
			}
		})
	}
	if h.opened.Load() != 0 {
		t.Error("a refused request opened a device")
	}
}

func TestPeersThatMaySpeak(t *testing.T) {
	group := os.Getegid() + 1
	for _, c := range []struct {
		name string
		rule PeerRule
		peer unix.Ucred
		want bool
	}{
		{"root", NoGroup, unix.Ucred{Uid: 0}, true},
		{"the daemon's user", NoGroup, unix.Ucred{Uid: uint32(os.Geteuid())}, true},
		{"nobody", NoGroup, unix.Ucred{Uid: 65534, Gid: 65534}, false},
		{"nobody in the group", PeerRule{Group: group}, unix.Ucred{Uid: 65534, Gid: uint32(group)}, true},
		{"nobody in another group", PeerRule{Group: group}, unix.Ucred{Uid: 65534, Gid: 65534}, false},
		{"a user that does not exist", PeerRule{Group: group}, unix.Ucred{Uid: 4000000000, Gid: 65534}, false},
	} {
		if got := c.rule.allows(&c.peer); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}

// Whatever bytes arrive as a request, the answer is one JSON object, and only a good request reaches a device.
func FuzzControlRequest(f *testing.F) {
	f.Add("application/json", []byte(`{"name":"data","device":"/dev/null","keys":["credential:right"]}`))
	f.Add("application/json", []byte(`{"name":"data","device":"/dev/null","keys":["-"],"via":"fuse","type":"plain","hash":"sha256"}`))
	var form bytes.Buffer
	m := multipart.NewWriter(&form)
	_ = m.WriteField("request", `{"name":"data","device":"/dev/null","keys":["-"]}`)
	_ = m.WriteField("key", "secret")
	_ = m.Close()
	f.Add(m.FormDataContentType(), form.Bytes())
	h := newFakeHost(f)
	engine := h.engine()
	f.Cleanup(func() { engine.Stop(context.Background()) })
	server := NewServer(engine, NoGroup, slog.New(slog.NewTextHandler(io.Discard, nil)))
	f.Fuzz(func(t *testing.T, contentType string, body []byte) {
		r := httptest.NewRequest("PUT", "/v1/volumes/data", bytes.NewReader(body))
		r.SetPathValue("name", "data")
		r.Header.Set("Content-Type", contentType)
		w := httptest.NewRecorder()
		server.attach(w, r)
		var answer api.Answer
		if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil || answer.Version != 1 || (answer.Error == nil) == (answer.Volume == nil) {
			t.Fatalf("%v: %s", err, w.Body)
		}
		if bytes.Contains(w.Body.Bytes(), []byte("canary")) && bytes.Contains(body, []byte("key\"\r\n\r\ncanary")) {
			t.Fatalf("the key came back: %s", w.Body)
		}
	})
}
