package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"voldek/blockdev"
	"voldek/blockdev/luks"
	"voldek/daemon/api"
	"voldek/internal/exit"
	"voldek/internal/secret"
	"voldek/keyclient"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeHost stands for disks and key services where a test is about the engine alone. It knows one key, "right", and counts
// what is open; it checks no format and encrypts nothing. The tests with real disks are in story_test.go.
type fakeHost struct {
	dir      string
	opened   atomic.Int32   // disks open now
	exported atomic.Int32   // exports made in all
	gate     chan struct{}  // a fetch waits until it is closed; nil: at once
	fetching chan struct{}  // gets a value when a fetch begins
	keys     map[string]any // key id -> key bytes or error
	busy     atomic.Bool    // exports refuse to close
}

func newFakeHost(t testing.TB) *fakeHost {
	h := &fakeHost{dir: t.TempDir(), fetching: make(chan struct{}, 4096), keys: map[string]any{
		"right": "right", "wrong": "wrong", "missing": keyclient.ErrNoKey, "away": keyclient.ErrUnreached, "denied": keyclient.ErrDenied,
	}}
	for _, device := range []string{"a", "b"} {
		if err := os.WriteFile(h.device(device), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return h
}

func (h *fakeHost) device(name string) string { return filepath.Join(h.dir, name) }

func (h *fakeHost) Fetch(ctx context.Context, ref keyclient.Ref, _ keyclient.Volume) (*secret.Buffer, error) {
	h.fetching <- struct{}{}
	if h.gate != nil {
		select {
		case <-h.gate:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	switch key := h.keys[ref.ID].(type) {
	case string:
		return secret.FromBytes([]byte(key))
	case error:
		return nil, key
	}
	return nil, keyclient.ErrNoKey
}

func (h *fakeHost) engine() *Engine {
	e, err := New(Config{Keys: h, RunDir: filepath.Join(h.dir, "run"), Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		panic(err)
	}
	e.open = func(spec blockdev.Spec, _ luks.Limits) (disk, error) {
		h.opened.Add(1)
		return &fakeDisk{host: h, spec: spec}, nil
	}
	return e
}

type fakeDisk struct {
	host *fakeHost
	spec blockdev.Spec
}

func (d *fakeDisk) UUID() string         { return "6c9a2f0e-1111-4222-8333-444455556666" }
func (d *fakeDisk) Header() *luks.Header { return &luks.Header{Version: 2} }
func (d *fakeDisk) Segment() luks.Segment {
	return luks.Segment{Cipher: "aes-xts-plain64", Length: 4096}
}
func (d *fakeDisk) Close() { d.host.opened.Add(-1) }

func (d *fakeDisk) Unlock(_ context.Context, key []byte, _ *luks.Budget) (*luks.VolumeKey, error) {
	if string(key) != "right" {
		return nil, luks.ErrWrongKey
	}
	volumeKey, err := secret.New(64)
	return &luks.VolumeKey{Key: volumeKey}, err
}

func (d *fakeDisk) Export(context.Context, *secret.Buffer, string) (blockdev.Export, error) {
	d.host.exported.Add(1)
	return &fakeExport{disk: d, gone: make(chan struct{})}, nil
}

type fakeExport struct {
	disk *fakeDisk
	once sync.Once
	gone chan struct{}
}

func (x *fakeExport) Path() string          { return "/export/" + x.disk.spec.Name }
func (x *fakeExport) Via() blockdev.Via     { return blockdev.FUSE }
func (x *fakeExport) Gone() <-chan struct{} { return x.gone }
func (x *fakeExport) Abandon()              { x.end() }
func (x *fakeExport) end()                  { x.once.Do(func() { close(x.gone) }) }

func (x *fakeExport) Lost() bool {
	select {
	case <-x.gone:
		return true
	default:
		return false
	}
}

var errFakeBusy = exit.New(exit.Busy, "in use")

func (x *fakeExport) Close(context.Context) error {
	if x.disk.host.busy.Load() && !x.Lost() {
		return errFakeBusy
	}
	x.end()
	x.disk.Close()
	return nil
}

func request(h *fakeHost, name, device string, keys ...string) api.AttachRequest {
	var refs []string
	for _, key := range keys {
		refs = append(refs, "credential:"+key)
	}
	return api.AttachRequest{Spec: blockdev.Spec{Name: name, Device: h.device(device)}, Keys: refs}
}

func TestAThousandAttachesOfOneVolumeGiveOneExport(t *testing.T) {
	h := newFakeHost(t)
	h.gate = make(chan struct{})
	e := h.engine()
	defer e.Stop(t.Context())
	const callers = 1000
	answers := make(chan api.Volume, callers)
	var wait sync.WaitGroup
	for range callers {
		wait.Go(func() {
			v, err := e.Attach(t.Context(), request(h, "data", "a", "right"), nil)
			if err != nil {
				t.Error(err)
			}
			answers <- v
		})
	}
	<-h.fetching
	close(h.gate)
	wait.Wait()
	close(answers)
	first := <-answers
	for v := range answers {
		if v.Export != first.Export || v.State != api.Open || !v.Since.Equal(first.Since) {
			t.Fatalf("two answers: %+v and %+v", first, v)
		}
	}
	if n := h.exported.Load(); n != 1 {
		t.Errorf("%d exports, want 1", n)
	}
}

func TestHowAttachEnds(t *testing.T) {
	for _, c := range []struct {
		name  string
		keys  []string
		code  exit.Code
		state api.State
	}{
		{"the right key", []string{"right"}, exit.OK, api.Open},
		{"the key opens no slot", []string{"wrong"}, exit.WrongKey, api.Failed},
		{"no such key", []string{"missing"}, exit.NoKey, api.Failed},
		{"denied", []string{"denied"}, exit.Denied, api.Failed},
		{"service away", []string{"away"}, exit.Unreached, api.Failed},
		{"the second key opens", []string{"wrong", "right"}, exit.OK, api.Open},
		{"the third service has it", []string{"away", "missing", "right"}, exit.OK, api.Open},
		{"a retry may help, whatever else failed", []string{"denied", "away", "wrong"}, exit.Unreached, api.Failed},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newFakeHost(t)
			e := h.engine()
			defer e.Stop(t.Context())
			_, err := e.Attach(t.Context(), request(h, "data", "a", c.keys...), nil)
			if got := exit.Of(err); got != c.code {
				t.Errorf("exit %d, want %d: %v", got, c.code, err)
			}
			v, err := e.Status("data")
			if err != nil || v.State != c.state {
				t.Errorf("state %q, want %q: %v", v.State, c.state, err)
			}
			if c.code != exit.OK && h.opened.Load() != 0 {
				t.Error("the device was not given back")
			}
		})
	}
}

func TestADeviceIsOpenUnderOneName(t *testing.T) {
	h := newFakeHost(t)
	e := h.engine()
	defer e.Stop(t.Context())
	attach := func(r api.AttachRequest) exit.Code {
		_, err := e.Attach(t.Context(), r, nil)
		return exit.Of(err)
	}
	if got := attach(request(h, "data", "a", "right")); got != exit.OK {
		t.Fatal(got)
	}
	other := request(h, "data", "a", "right")
	other.ReadOnly = true
	link := request(h, "link", "l", "right")
	if err := os.Symlink(h.device("a"), h.device("l")); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		request api.AttachRequest
		want    exit.Code
	}{
		"again":                   {request(h, "data", "a", "right"), exit.OK},
		"another name":            {request(h, "more", "a", "right"), exit.Busy},
		"another name and path":   {link, exit.Busy},
		"other options":           {other, exit.Busy},
		"another device":          {request(h, "data", "b", "right"), exit.Busy},
		"another name and device": {request(h, "more", "b", "right"), exit.OK},
		"no such device":          {request(h, "none", "none", "right"), exit.NoDevice},
	} {
		if got := attach(c.request); got != c.want {
			t.Errorf("%s: exit %d, want %d", name, got, c.want)
		}
	}
}

func TestAnAttachNobodyWaitsForIsUndone(t *testing.T) {
	h := newFakeHost(t)
	h.gate = make(chan struct{}) // never opened
	e := h.engine()
	defer e.Stop(t.Context())
	first, leave := context.WithCancel(t.Context())
	second, leaveToo := context.WithCancel(t.Context())
	errs := make(chan error, 2)
	for _, ctx := range []context.Context{first, second} {
		go func() {
			_, err := e.Attach(ctx, request(h, "data", "a", "right"), nil)
			errs <- err
		}()
	}
	<-h.fetching
	leave()
	leaveToo()
	for range 2 {
		if err := <-errs; exit.Of(err) != exit.Interrupted {
			t.Errorf("got %v", err)
		}
	}
	if _, err := e.Detach(t.Context(), "data"); err != nil {
		t.Error(err)
	}
	if h.opened.Load() != 0 || h.exported.Load() != 0 {
		t.Error("something was left open")
	}
}

func TestDetachCancelsAnAttachOnItsWay(t *testing.T) {
	h := newFakeHost(t)
	h.gate = make(chan struct{})
	e := h.engine()
	defer e.Stop(t.Context())
	attached := make(chan error, 1)
	go func() {
		_, err := e.Attach(t.Context(), request(h, "data", "a", "right"), nil)
		attached <- err
	}()
	<-h.fetching
	v, err := e.Detach(t.Context(), "data")
	if err != nil || v.State != api.Detached {
		t.Errorf("%v %v", v.State, err)
	}
	if err := <-attached; !errors.Is(err, ErrUndone) {
		t.Errorf("the attach ended with %v", err)
	}
}

func TestABusyVolumeStaysOpen(t *testing.T) {
	h := newFakeHost(t)
	e := h.engine()
	defer e.Stop(t.Context())
	if _, err := e.Attach(t.Context(), request(h, "data", "a", "right"), nil); err != nil {
		t.Fatal(err)
	}
	h.busy.Store(true)
	if _, err := e.Detach(t.Context(), "data"); exit.Of(err) != exit.Busy {
		t.Errorf("got %v", err)
	}
	if v, err := e.Status("data"); err != nil || v.State != api.Open {
		t.Errorf("state %q, %v", v.State, err)
	}
	h.busy.Store(false)
	for range 2 { // the second time after a lost answer
		if v, err := e.Detach(t.Context(), "data"); err != nil || v.State != api.Detached {
			t.Errorf("state %q, %v", v.State, err)
		}
	}
}

func TestAnExportTakenDownBySomebodyElseIsNoticed(t *testing.T) {
	h := newFakeHost(t)
	e := h.engine()
	defer e.Stop(t.Context())
	if _, err := e.Attach(t.Context(), request(h, "data", "a", "right"), nil); err != nil {
		t.Fatal(err)
	}
	events, stop := e.Watch()
	defer stop()
	e.mu.Lock()
	export := e.volumes["data"].export.(*fakeExport)
	e.mu.Unlock()
	export.end()
	for event := range events {
		if event.State == api.Detached {
			break
		}
	}
	if list := e.List(); len(list) != 0 {
		t.Errorf("still listed: %+v", list)
	}
	if h.opened.Load() != 0 {
		t.Error("the device was not given back")
	}
}

// An export that is not in the journal would be lost to the next process, so there must be none.
func TestNoExportWithoutAJournal(t *testing.T) {
	h := newFakeHost(t)
	e := h.engine()
	defer e.Stop(t.Context())
	if err := os.RemoveAll(e.journal.dir); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Attach(t.Context(), request(h, "data", "a", "right"), nil); err == nil {
		t.Error("attached without a journal")
	}
	if h.exported.Load() != 0 || h.opened.Load() != 0 {
		t.Error("something was left open")
	}
}

func TestStopWaitsForUsersAndKeepsTheJournal(t *testing.T) {
	h := newFakeHost(t)
	e := h.engine()
	if _, err := e.Attach(t.Context(), request(h, "data", "a", "right"), nil); err != nil {
		t.Fatal(err)
	}
	h.busy.Store(true)
	ctx, cancel := context.WithCancel(t.Context())
	stopped := make(chan struct{})
	go func() { e.Stop(ctx); close(stopped) }()
	select {
	case <-stopped:
		t.Fatal("stopped while the volume was in use")
	case <-e.life.Done():
	}
	if _, err := e.Attach(t.Context(), request(h, "more", "b", "right"), nil); exit.Of(err) != exit.NoDaemon {
		t.Errorf("a stopping daemon attached: %v", err)
	}
	h.busy.Store(false)
	<-stopped
	cancel()
	if entries, problems := e.journal.read(); len(entries) != 1 || len(problems) != 0 {
		t.Errorf("journal: %v %v", entries, problems)
	}
}

// Any sequence of attaches, detaches and losses leaves exactly the volumes open that the model says.
func TestSequencesAgainstAModel(t *testing.T) {
	h := newFakeHost(t)
	rapid.Check(t, func(t *rapid.T) {
		e := h.engine()
		defer e.Stop(context.Background())
		open := map[string]string{} // name -> device
		names := rapid.SampledFrom([]string{"x", "y", "z"})
		devices := rapid.SampledFrom([]string{"a", "b"})
		t.Repeat(map[string]func(*rapid.T){
			"attach": func(t *rapid.T) {
				name, device := names.Draw(t, "name"), devices.Draw(t, "device")
				key := rapid.SampledFrom([]string{"right", "wrong", "missing"}).Draw(t, "key")
				want := modelAttach(open, name, device, key)
				_, err := e.Attach(context.Background(), request(h, name, device, key), nil)
				if exit.Of(err) != want {
					t.Fatalf("attach %s %s %s: exit %d, want %d: %v", name, device, key, exit.Of(err), want, err)
				}
			},
			"detach": func(t *rapid.T) {
				name := names.Draw(t, "name")
				if _, err := e.Detach(context.Background(), name); err != nil {
					t.Fatal(err)
				}
				delete(open, name)
			},
			"": func(t *rapid.T) {
				got := map[string]string{}
				for _, v := range e.List() {
					if v.State == api.Open {
						got[v.Name] = filepath.Base(v.Device)
					}
				}
				if fmt.Sprint(got) != fmt.Sprint(open) || int(h.opened.Load()) != len(open) {
					t.Fatalf("open: %v (%d devices), want %v", got, h.opened.Load(), open)
				}
			},
		})
	})
}

func modelAttach(open map[string]string, name, device, key string) exit.Code {
	if open[name] == device {
		return exit.OK // open already, whatever the key
	}
	for other, d := range open {
		if other == name || d == device {
			return exit.Busy
		}
	}
	switch key {
	case "right":
		open[name] = device
		return exit.OK
	case "wrong":
		return exit.WrongKey
	}
	return exit.NoKey
}
