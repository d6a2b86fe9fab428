package daemon

import (
	"context"
	"time"

	"voldek/daemon/api"
)

// Detach flushes and closes a volume. It is idempotent: a volume that is not open is detached already. An attach on its
// way is cancelled. An error with exit.Busy means that somebody uses the volume; it is open as before.
func (e *Engine) Detach(ctx context.Context, name string) (api.Volume, error) {
	for {
		v, op := e.joinOrStartDetach(name)
		if op == nil {
			return v, nil
		}
		err := e.wait(ctx, op)
		if err != nil && op.detach {
			return api.Volume{}, err
		}
		if ctx.Err() != nil {
			return api.Volume{}, ctx.Err()
		}
	}
}

// joinOrStartDetach returns the detached volume, or the operation to wait for before looking again.
func (e *Engine) joinOrStartDetach(name string) (api.Volume, *operation) {
	e.mu.Lock()
	defer e.mu.Unlock()
	v := e.volumes[name]
	if v == nil {
		return api.Volume{Name: name, State: api.Detached, Since: time.Now().UTC()}, nil
	}
	e.noticeLoss(v)
	if op := v.running; op != nil {
		if !op.detach {
			op.cancel()
		}
		op.waiters++
		return api.Volume{}, op
	}
	switch v.public.State {
	case api.Open:
		return api.Volume{}, e.startDetach(v)
	case api.Failed:
		e.becomeDetached(v)
	}
	public := v.public
	e.forgetDetached()
	return public, nil
}

// startDetach begins a detach with one waiter. It is not cancelled half-way when the caller goes. The caller holds e.mu.
func (e *Engine) startDetach(v *volume) *operation {
	op := &operation{done: make(chan struct{}), cancel: func() {}, waiters: 1, detach: true}
	v.running = op
	e.setState(v, api.Closing, nil)
	export := v.export
	e.tasks.Go(func() {
		err := export.Close(context.Background())
		e.mu.Lock()
		defer e.mu.Unlock()
		if err != nil && !export.Lost() {
			e.setState(v, api.Open, nil)
		} else {
			if err != nil {
				e.config.Log.Error("close an export", "volume", v.public.Name, "error", err)
			}
			e.becomeDetached(v)
		}
		op.err = err
		v.running = nil
		e.forgetDetached()
		close(op.done)
	})
	return op
}
