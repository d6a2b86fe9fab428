package daemon

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"time"

	"voldek/blockdev"
	"voldek/blockdev/dm"
	"voldek/daemon/api"
	"voldek/internal/exit"
	"voldek/keyclient"
)

// The pauses between background attempts: exponential with full jitter, so that a fleet that lost its key service does
// not come back in step.
const (
	firstPause = time.Second
	longPause  = time.Minute
)

// Restore takes up what an earlier process left: it adopts dm-crypt mappings, which outlive a process, and attaches FUSE
// volumes again in the background, which do not. Call it once, before Serve.
func (e *Engine) Restore() {
	entries, problems := e.journal.read()
	for _, err := range problems {
		e.config.Log.Error("restore", "error", err)
	}
	for _, entry := range entries {
		if err := e.restoreOne(entry); err != nil {
			e.config.Log.Error("restore", "volume", entry.Request.Name, "error", err)
		}
	}
}

func (e *Engine) restoreOne(entry entry) error {
	request := entry.Request
	export, err := blockdev.Adopt(request.Spec, entry.LUKSVersion, entry.Volume.UUID)
	if err == nil {
		return e.adopt(entry, export)
	}
	if !errors.Is(err, dm.ErrNotFound) && !errors.Is(err, dm.ErrUnavailable) {
		return err
	}
	if err := blockdev.CleanMountPoint(filepath.Join(e.mountDir(), request.Name)); err != nil {
		return err
	}
	if err := e.journal.remove(request.Name); err != nil {
		return err
	}
	if entry.Volume.Via != blockdev.FUSE {
		return nil // it never came up, or was taken down while no daemon ran
	}
	if needsCaller(request.Keys) {
		return fmt.Errorf("the FUSE export ended with the earlier process, and its key came from a caller; attach it again")
	}
	e.attachInBackground(request)
	return nil
}

// needsCaller reports whether one of the references, which were parsed before they came into the journal, is a key that
// only a caller can bring.
func needsCaller(keys []string) bool {
	return slices.ContainsFunc(keys, func(text string) bool {
		ref, err := keyclient.ParseRef(text)
		return err == nil && ref.FromCaller()
	})
}

// adopt enters a mapping that an earlier process made as an open volume.
func (e *Engine) adopt(entry entry, export blockdev.Export) error {
	id, err := blockdev.Identify(entry.Request.Device)
	if err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	public := entry.Volume
	public.State, public.Export, public.Via, public.Steps = api.Open, export.Path(), export.Via(), nil
	e.volumes[public.Name] = &volume{public: public, request: entry.Request, id: id, export: export}
	e.config.Log.Info("found again", "volume", public.Name, "device", public.Device, "export", public.Export)
	return nil
}

// Configure sets the key services and the volumes of the configuration, and attaches those that are not open in the
// background. It may be called again after the configuration was reloaded; what is open stays open.
func (e *Engine) Configure(keys keyclient.Client, atBoot []api.AttachRequest) {
	e.mu.Lock()
	e.keys = keys
	for _, v := range e.volumes {
		v.listed, v.public.AtBoot = false, false
	}
	var missing []api.AttachRequest
	for _, request := range atBoot {
		v := e.volumes[request.Name]
		if v == nil {
			v = &volume{public: api.Volume{
				Name: request.Name, Device: request.Device, Header: request.Header, State: api.Detached, Since: time.Now().UTC(),
			}}
			e.volumes[request.Name] = v
		}
		v.listed, v.public.AtBoot = true, true
		if v.public.State != api.Open && v.running == nil {
			missing = append(missing, request)
		}
	}
	e.forgetDetached()
	e.mu.Unlock()
	for _, request := range missing {
		e.attachInBackground(request)
	}
}

// attachInBackground repeats an attach until the volume is open, or until an answer that waiting does not change: a
// header or a key that is wrong, a service that refuses.
func (e *Engine) attachInBackground(request api.AttachRequest) {
	e.tasks.Go(func() {
		for pause := firstPause; ; pause = min(2*pause, longPause) {
			_, err := e.Attach(e.life, request, nil)
			if err == nil || !mayHeal(err) {
				return
			}
			select {
			case <-time.After(rand.N(pause)):
			case <-e.life.Done():
				return
			}
		}
	})
}

func mayHeal(err error) bool {
	switch exit.Of(err) {
	case exit.Unreached, exit.NoDevice, exit.Busy, exit.NoBackend, exit.Failed:
		return true
	}
	return false
}

// Stop ends the engine. Attaches on their way are undone; dm-crypt mappings stay, to be found again by the next process;
// FUSE volumes are flushed and unmounted. One that is in use is served on until its users leave it or ctx ends, and then
// unmounted lazily: what was acknowledged has reached the device either way. The journal keeps FUSE volumes, so that the
// next process opens them again.
func (e *Engine) Stop(ctx context.Context) {
	e.mu.Lock()
	e.stopping = true
	for _, v := range e.volumes {
		if v.running != nil {
			v.running.cancel()
		}
	}
	e.mu.Unlock()
	e.end()
	e.tasks.Wait()
	for e.closeFUSE(ctx) > 0 {
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			e.abandonFUSE()
			return
		}
	}
}

// closeFUSE closes the FUSE exports that nobody uses and returns how many are left.
func (e *Engine) closeFUSE(ctx context.Context) (left int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, v := range e.volumes {
		if v.export == nil || v.export.Via() != blockdev.FUSE {
			continue
		}
		if err := v.export.Close(ctx); err != nil && !v.export.Lost() {
			left++
			continue
		}
		e.leave(v)
	}
	return left
}

func (e *Engine) abandonFUSE() {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, v := range e.volumes {
		if v.export != nil && v.export.Via() == blockdev.FUSE {
			e.config.Log.Warn("still in use, unmounted lazily", "volume", v.public.Name, "export", v.public.Export)
			v.export.Abandon()
			e.leave(v)
		}
	}
}
