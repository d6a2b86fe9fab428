package daemon

import (
	"context"
	"fmt"
	"runtime/debug"
	"time"

	"voldek/blockdev"
	"voldek/daemon/api"
	"voldek/internal/secret"
	"voldek/internal/unlock"
	"voldek/keyclient"
)

// Attach opens a volume and returns it open. It is idempotent: while an equal request is on its way it waits for that
// one, and when the volume is open already it returns it. supplied is the key for the references - and ask, or nil; it is
// wiped. When ctx ends, and no other caller waits, the attach is undone.
func (e *Engine) Attach(ctx context.Context, request api.AttachRequest, supplied *secret.Buffer) (api.Volume, error) {
	defer supplied.Wipe()
	refs, err := checkRequest(&request)
	if err != nil {
		return api.Volume{}, err
	}
	id, err := blockdev.Identify(request.Device)
	if err != nil {
		return api.Volume{}, err
	}
	for {
		v, op, err := e.joinOrStart(request, refs, id, supplied)
		if err != nil {
			return api.Volume{}, err
		}
		if op == nil {
			return v, nil
		}
		if err := e.wait(ctx, op); err != nil {
			return api.Volume{}, err
		}
	}
}

// checkRequest validates a request and parses its references.
func checkRequest(request *api.AttachRequest) ([]keyclient.Ref, error) {
	if err := request.Check(); err != nil {
		return nil, err
	}
	if request.Timeout < 0 || request.Timeout > 24*3600 {
		return nil, fmt.Errorf("%w: timeout %v: want seconds up to a day", ErrRequest, request.Timeout)
	}
	if len(request.Keys) == 0 || len(request.Keys) > 16 {
		return nil, fmt.Errorf("%w: keys: want 1 to 16 key references", ErrRequest)
	}
	var refs []keyclient.Ref
	for _, text := range request.Keys {
		ref, err := keyclient.ParseRef(text)
		if err != nil {
			return nil, err
		}
		refs = append(refs, ref)
	}
	return refs, nil
}

// joinOrStart returns the volume where it is open as requested, or else the operation to wait for before looking again.
func (e *Engine) joinOrStart(
	request api.AttachRequest, refs []keyclient.Ref, id blockdev.DeviceID, supplied *secret.Buffer,
) (api.Volume, *operation, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.stopping {
		return api.Volume{}, nil, ErrStopping
	}
	if err := e.deviceTaken(request.Name, id); err != nil {
		return api.Volume{}, nil, err
	}
	v := e.volumes[request.Name]
	if v == nil {
		v = &volume{public: api.Volume{Name: request.Name, Device: request.Device, State: api.Detached}}
		e.volumes[request.Name] = v
	}
	e.noticeLoss(v)
	attaching := v.running != nil && !v.running.detach
	if (attaching || v.public.State == api.Open) && !(v.id == id && sameVolume(v.request.Spec, request.Spec)) {
		return api.Volume{}, nil, fmt.Errorf("%s: %w as %s, from %s with other options", request.Device, ErrBusy, request.Name, v.public.Device)
	}
	if v.running != nil {
		v.running.waiters++
		return api.Volume{}, v.running, nil
	}
	if v.public.State == api.Open {
		return v.public, nil, nil
	}
	key, err := cloneKey(supplied)
	if err != nil {
		return api.Volume{}, nil, err
	}
	v.request, v.id = request, id
	return api.Volume{}, e.startAttach(v, refs, key), nil
}

func cloneKey(key *secret.Buffer) (*secret.Buffer, error) {
	if key == nil {
		return nil, nil
	}
	return key.Clone()
}

// deviceTaken returns ErrBusy where another volume uses the device. The caller holds e.mu.
func (e *Engine) deviceTaken(name string, id blockdev.DeviceID) error {
	for other, v := range e.volumes {
		if other == name || v.id != id {
			continue
		}
		e.noticeLoss(v)
		if v.running != nil || v.public.State == api.Open {
			return fmt.Errorf("%s: %w as %s", v.public.Device, ErrBusy, other)
		}
	}
	return nil
}

// sameVolume reports whether an open volume is what a second request asks for. Who asks for any backend takes either.
func sameVolume(open, asked blockdev.Spec) bool {
	open.Device, asked.Device = "", "" // compared by their identity
	if open.Via == blockdev.Auto || asked.Via == blockdev.Auto {
		open.Via = asked.Via
	}
	return open == asked
}

// wait returns nil when op ended well, and cancels it when ctx ended and nobody else waits.
func (e *Engine) wait(ctx context.Context, op *operation) error {
	select {
	case <-op.done:
		return op.err
	case <-ctx.Done():
	}
	e.mu.Lock()
	op.waiters--
	if op.waiters == 0 && !op.detach {
		op.cancel()
	}
	e.mu.Unlock()
	return ctx.Err()
}

// startAttach begins an attach with one waiter. It takes key over. The caller holds e.mu.
func (e *Engine) startAttach(v *volume, refs []keyclient.Ref, key *secret.Buffer) *operation {
	ctx, cancel := context.WithCancel(context.Background())
	op := &operation{done: make(chan struct{}), cancel: cancel, waiters: 1}
	v.running = op
	v.public = api.Volume{
		Name: v.request.Name, Device: v.request.Device, Header: v.request.Header, Type: v.request.Type,
		ReadOnly: v.request.ReadOnly, State: v.public.State, AtBoot: v.public.AtBoot,
	}
	e.setState(v, api.Fetching, nil)
	run := &attachRun{
		engine: e, volume: v, request: v.request, public: v.public, keys: withSupplied(e.keys, key), refs: refs, start: time.Now(),
	}
	e.tasks.Go(func() {
		defer cancel()
		defer key.Wipe()
		export, err := run.run(ctx)
		e.finishAttach(ctx, run, export, err)
	})
	return op
}

// finishAttach records how an attach ended and wakes its waiters.
func (e *Engine) finishAttach(ctx context.Context, run *attachRun, export blockdev.Export, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	v, op := run.volume, run.volume.running
	run.public.Steps.Total = time.Since(run.start).Seconds()
	run.public.State, run.public.AtBoot = v.public.State, v.listed
	v.public = run.public
	switch {
	case err == nil:
		v.export = export
		e.setState(v, api.Open, nil)
		e.watchExport(v, export)
	case ctx.Err() != nil:
		err = ErrUndone
		e.becomeDetached(v)
	default:
		e.setState(v, api.Failed, api.NewError(err, ""))
	}
	op.err = err
	v.running = nil
	e.forgetDetached()
	close(op.done)
	e.giveBackMemory()
}

// giveBackMemory returns what an attach left on the heap to the system, once none is on its way: a daemon idles for months,
// and pages that were given back hold no remains of anybody's key. The caller holds e.mu.
func (e *Engine) giveBackMemory() {
	for _, v := range e.volumes {
		if v.running != nil {
			return
		}
	}
	e.tasks.Go(debug.FreeOSMemory)
}

// attachRun is one attach on its way. public collects what will be told of the volume.
type attachRun struct {
	engine  *Engine
	volume  *volume
	request api.AttachRequest
	public  api.Volume
	keys    keyclient.Client
	refs    []keyclient.Ref
	start   time.Time
}

// run reads the header, fetches and proves a key, and exports the volume.
func (r *attachRun) run(ctx context.Context) (blockdev.Export, error) {
	r.public.Steps = &api.Steps{}
	d, err := r.engine.open(r.request.Spec, r.engine.config.Limits)
	r.public.Steps.Header = time.Since(r.start).Seconds()
	if err != nil {
		return nil, err
	}
	r.describe(d)
	unlocked, err := r.unlock(ctx, d)
	if err == nil && ctx.Err() != nil {
		unlocked.VolumeKey.Key.Wipe()
		err = ctx.Err()
	}
	if err != nil {
		d.Close()
		return nil, err
	}
	defer unlocked.VolumeKey.Key.Wipe()
	if slot := unlocked.VolumeKey.Keyslot; slot != blockdev.NoKeyslot {
		r.public.Keyslot = &slot
	}
	r.public.Key = unlocked.Ref.String()
	return r.export(ctx, d, unlocked)
}

// describe takes what the header says about the volume.
func (r *attachRun) describe(d disk) {
	segment := d.Segment()
	r.public.UUID = d.UUID()
	r.public.Cipher = segment.Cipher
	r.public.KeyBits = segment.KeySize * 8
	r.public.SectorSize = segment.SectorSize
	r.public.Size = segment.Length
	if header := d.Header(); header != nil {
		r.public.Type = fmt.Sprintf("luks%d", header.Version)
	}
}

func (r *attachRun) unlock(ctx context.Context, d disk) (*unlock.Result, error) {
	timeout := r.engine.config.Timeout
	if r.request.Timeout > 0 {
		timeout = time.Duration(r.request.Timeout * float64(time.Second))
	}
	attempt := unlock.Attempt{
		Name: r.request.Name, Refs: r.refs, Keys: r.keys, Budget: r.engine.config.Budget, Timeout: timeout,
		Fetched: func(keyclient.Ref) { r.moveTo(api.Unlocking) },
		Missed:  func(keyclient.Ref) { r.moveTo(api.Fetching) },
	}
	result, err := attempt.Unlock(ctx, d)
	if err != nil {
		return nil, err
	}
	r.public.Steps.Fetch = result.Fetch.Seconds()
	r.public.Steps.Keyslot = result.Keyslot.Seconds()
	return result, nil
}

func (r *attachRun) moveTo(state api.State) {
	r.engine.mu.Lock()
	defer r.engine.mu.Unlock()
	r.engine.setState(r.volume, state, nil)
}

// export writes the journal before and after: an export without an entry would be lost to the next process.
func (r *attachRun) export(ctx context.Context, d disk, unlocked *unlock.Result) (blockdev.Export, error) {
	record := entry{Request: r.request, Volume: r.public}
	if header := d.Header(); header != nil {
		record.LUKSVersion = header.Version
	}
	if err := r.engine.journal.write(record); err != nil {
		d.Close()
		return nil, err
	}
	start := time.Now()
	export, err := d.Export(ctx, unlocked.VolumeKey.Key, r.engine.mountDir())
	if err == nil {
		r.public.Export, r.public.Via = export.Path(), export.Via()
		r.public.Steps.Export = time.Since(start).Seconds()
		record.Volume = r.public
		if err = ctx.Err(); err == nil {
			err = r.engine.journal.write(record)
		}
		if err != nil {
			_ = export.Close(context.WithoutCancel(ctx))
		}
	}
	if err != nil {
		_ = r.engine.journal.remove(r.request.Name)
		return nil, err
	}
	return export, nil
}

// suppliedKeys answers the references - and ask with the key that came with the request, and leaves the rest to next.
type suppliedKeys struct {
	key  *secret.Buffer
	next keyclient.Client
}

func withSupplied(next keyclient.Client, key *secret.Buffer) keyclient.Client {
	return &suppliedKeys{key: key, next: next}
}

func (s *suppliedKeys) Fetch(ctx context.Context, ref keyclient.Ref, v keyclient.Volume) (*secret.Buffer, error) {
	if !ref.FromCaller() {
		return s.next.Fetch(ctx, ref, v)
	}
	if s.key == nil {
		return nil, fmt.Errorf("%w: the caller sent no key", ErrRequest)
	}
	return s.key.Clone()
}
