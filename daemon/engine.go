// Package daemon is the attach engine: it fetches keys, opens volumes through blockdev, keeps one state machine per
// volume and a journal of what is open, and answers on the control socket. It knows no format and no key service.
package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"voldek/blockdev"
	"voldek/blockdev/luks"
	"voldek/daemon/api"
	"voldek/internal/exit"
	"voldek/internal/secret"
	"voldek/keyclient"
)

// ErrBusy is returned for a name or a device that is taken; ErrNotOpen for a volume that is not open; ErrStopping while
// the daemon ends.
var (
	ErrBusy     = exit.New(exit.Busy, "already open")
	ErrNotOpen  = exit.New(exit.NoDevice, "no open volume has this name")
	ErrStopping = exit.New(exit.NoDaemon, "the daemon is stopping")
	ErrRequest  = exit.New(exit.Usage, "bad request")
	ErrUndone   = exit.New(exit.Interrupted, "the attach was given up and undone")
)

// Config is what an Engine is made of.
type Config struct {
	Keys    keyclient.Client
	Limits  luks.Limits
	Budget  *luks.Budget
	RunDir  string        // the journal lies in RunDir/volumes, FUSE volumes are mounted under RunDir/fuse
	Timeout time.Duration // for fetching a key, where a request names none
	Log     *slog.Logger
}

// Engine holds all volumes. Its methods are safe for concurrent use.
type Engine struct {
	config  Config
	journal *journal
	open    func(blockdev.Spec, luks.Limits) (disk, error)
	life    context.Context // ends with Stop
	end     context.CancelFunc
	tasks   sync.WaitGroup // operations, and goroutines that end with life

	mu       sync.Mutex
	keys     keyclient.Client
	volumes  map[string]*volume
	stopping bool
	watchers map[chan api.Event]struct{}
}

// disk is what the engine needs of a blockdev.Device.
type disk interface {
	UUID() string
	Header() *luks.Header
	Segment() luks.Segment
	Unlock(ctx context.Context, key []byte, budget *luks.Budget) (*luks.VolumeKey, error)
	Export(ctx context.Context, volumeKey *secret.Buffer, mountDir string) (blockdev.Export, error)
	Close()
}

// volume is one state machine. Everything in it is guarded by Engine.mu.
type volume struct {
	public  api.Volume
	request api.AttachRequest // the last attach
	id      blockdev.DeviceID // of its device
	export  blockdev.Export   // while open or closing
	running *operation        // an attach or a detach, nil between them
	listed  bool              // in the configuration
}

// operation is an attach or a detach that several callers may wait for.
type operation struct {
	done    chan struct{} // closed when it ended
	err     error         // valid then
	cancel  context.CancelFunc
	waiters int
	detach  bool
}

// New returns an engine whose run directory exists.
func New(c Config) (*Engine, error) {
	j, err := openJournal(filepath.Join(c.RunDir, "volumes"))
	if err != nil {
		return nil, err
	}
	life, end := context.WithCancel(context.Background())
	return &Engine{
		config:   c,
		journal:  j,
		open:     openDevice,
		keys:     c.Keys,
		life:     life,
		end:      end,
		volumes:  map[string]*volume{},
		watchers: map[chan api.Event]struct{}{},
	}, nil
}

func openDevice(spec blockdev.Spec, limits luks.Limits) (disk, error) {
	d, err := blockdev.Open(spec, limits)
	if err != nil {
		return nil, err
	}
	return d, nil
}

func (e *Engine) mountDir() string { return filepath.Join(e.config.RunDir, "fuse") }

// List returns all volumes that are open, on their way, failed, or listed in the configuration, by name.
func (e *Engine) List() []api.Volume {
	e.mu.Lock()
	defer e.mu.Unlock()
	list := []api.Volume{}
	for _, v := range e.volumes {
		e.noticeLoss(v)
		list = append(list, v.public)
	}
	e.forgetDetached()
	slices.SortFunc(list, func(a, b api.Volume) int { return strings.Compare(a.Name, b.Name) })
	return list
}

// Status returns one volume, ErrNotOpen where there is none of that name.
func (e *Engine) Status(name string) (api.Volume, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	v := e.volumes[name]
	if v != nil {
		e.noticeLoss(v)
	}
	if v == nil || v.public.State == api.Detached && !v.listed {
		return api.Volume{}, fmt.Errorf("%s: %w", name, ErrNotOpen)
	}
	return v.public, nil
}

// setState moves v along an arrow of the drawing and tells the watchers. The caller holds e.mu.
func (e *Engine) setState(v *volume, to api.State, failure *api.Error) {
	mustBeArrow(v.public.State, to)
	v.public.State = to
	v.public.Since = time.Now().UTC()
	v.public.Error = failure
	log := e.config.Log.With("volume", v.public.Name, "device", v.public.Device, "state", to)
	if failure != nil {
		log.Error("volume state", "error", failure.Message, "exit", int(failure.Exit))
	} else {
		log.Info("volume state")
	}
	event := api.Event{Version: api.Version, Time: v.public.Since, Name: v.public.Name, State: to, Error: failure}
	for w := range e.watchers {
		select {
		case w <- event:
		default: // a watcher that does not read loses events, not the daemon's time
		}
	}
}

// Watch returns a channel that begins with the states of all volumes and goes on with every change, and a function that
// ends it. A watcher that does not read loses events.
func (e *Engine) Watch() (<-chan api.Event, func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	w := make(chan api.Event, len(e.volumes)+256)
	for name, v := range e.volumes {
		w <- api.Event{Version: api.Version, Time: v.public.Since, Name: name, State: v.public.State, Error: v.public.Error}
	}
	e.watchers[w] = struct{}{}
	return w, func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.watchers, w)
	}
}

// noticeLoss finds out that somebody else took a kernel export down, cryptsetup close for one. A FUSE export tells by
// itself, see watchExport. The caller holds e.mu.
func (e *Engine) noticeLoss(v *volume) {
	if v.public.State == api.Open && v.running == nil && v.export.Gone() == nil && v.export.Lost() {
		e.config.Log.Warn("the export was taken down by somebody else", "volume", v.public.Name)
		e.becomeDetached(v)
	}
}

// becomeDetached forgets an export that has ended. The caller holds e.mu.
func (e *Engine) becomeDetached(v *volume) {
	if err := e.journal.remove(v.public.Name); err != nil {
		e.config.Log.Error("forget a volume", "volume", v.public.Name, "error", err)
	}
	e.leave(v)
}

// leave ends what is known of an export, but for the journal. The caller holds e.mu.
func (e *Engine) leave(v *volume) {
	v.export = nil
	v.public = api.Volume{
		Name: v.public.Name, Device: v.public.Device, Header: v.public.Header, State: v.public.State, AtBoot: v.public.AtBoot,
	}
	e.setState(v, api.Detached, nil)
}

// forgetDetached drops the volumes that nobody asks for any more. The caller holds e.mu.
func (e *Engine) forgetDetached() {
	for name, v := range e.volumes {
		if v.public.State == api.Detached && v.running == nil && !v.listed {
			delete(e.volumes, name)
		}
	}
}

// watchExport closes a FUSE export that ended by itself, after umount for one. The caller holds e.mu.
func (e *Engine) watchExport(v *volume, export blockdev.Export) {
	if export.Gone() == nil {
		return
	}
	e.tasks.Go(func() {
		select {
		case <-export.Gone():
		case <-e.life.Done():
			return
		}
		e.mu.Lock()
		defer e.mu.Unlock()
		if v.export == export && v.running == nil {
			e.config.Log.Warn("the export was unmounted by somebody else", "volume", v.public.Name)
			e.startDetach(v)
		}
	})
}
