// Package unlock brings a disk that waits for a key and the references that may have it together: it fetches keys until
// the header proves one. It opens no device and knows no key service.
package unlock

import (
	"context"
	"errors"
	"fmt"
	"time"

	"voldek/blockdev/luks"
	"voldek/internal/exit"
	"voldek/keyclient"
)

// TokenType is the type of the LUKS2 token that holds a key reference.
const TokenType = "voldek"

// Disk is what Unlock needs of a blockdev.Device.
type Disk interface {
	UUID() string
	Header() *luks.Header
	Unlock(ctx context.Context, key []byte, budget *luks.Budget) (*luks.VolumeKey, error)
}

// Attempt is how to unlock: the references in order, who resolves them, and what bounds key derivation.
type Attempt struct {
	Name    string // the volume's name, for a key service that wants one
	Refs    []keyclient.Ref
	Keys    keyclient.Client
	Budget  *luks.Budget
	Timeout time.Duration       // for fetching, all references together; 0: none
	Fetched func(keyclient.Ref) // called before a key is tried; may be nil
	Missed  func(keyclient.Ref) // called when a key opened no slot and another reference is left; may be nil
}

// Result is the proven volume key, which the caller wipes, and how it was come by.
type Result struct {
	VolumeKey      *luks.VolumeKey
	Ref            keyclient.Ref
	Fetch, Keyslot time.Duration
}

// Unlock tries the references in order. A missing key, a refusal, a service that is not reached and a key that opens no
// slot mean "try the next"; anything else, such as an I/O error, ends the attempt. Where all fail, the error that is worth
// a retry comes first, so that its exit code is the answer's.
func (a *Attempt) Unlock(ctx context.Context, disk Disk) (*Result, error) {
	refs, err := resolveTokens(a.Refs, disk.Header())
	if err != nil {
		return nil, err
	}
	var failures []error
	result := &Result{}
	for i, ref := range refs {
		err := a.try(ctx, a.share(result.Fetch, len(refs)-i), disk, ref, result)
		if err == nil {
			return result, nil
		}
		failures = append(failures, fmt.Errorf("key %s: %w", ref, err))
		if !tryNext(err) || ctx.Err() != nil {
			break
		}
		if a.Missed != nil && errors.Is(err, luks.ErrWrongKey) && i+1 < len(refs) {
			a.Missed(ref)
		}
	}
	return nil, mostUseful(failures)
}

// share is the time for one of the references that are left: an equal part, so that a dead service leaves time for the
// next; 0 is no limit.
func (a *Attempt) share(used time.Duration, left int) time.Duration {
	if a.Timeout <= 0 {
		return 0
	}
	return max((a.Timeout-used)/time.Duration(left), time.Millisecond)
}

func (a *Attempt) try(ctx context.Context, timeout time.Duration, disk Disk, ref keyclient.Ref, result *Result) error {
	fetchCtx := ctx
	if timeout > 0 {
		var cancel context.CancelFunc
		fetchCtx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	start := time.Now()
	key, err := a.Keys.Fetch(fetchCtx, ref, keyclient.Volume{UUID: disk.UUID(), Name: a.Name})
	fetched := time.Now()
	result.Fetch += fetched.Sub(start)
	if err != nil {
		return err
	}
	defer key.Wipe()
	if a.Fetched != nil {
		a.Fetched(ref)
	}
	result.Ref = ref
	result.VolumeKey, err = disk.Unlock(ctx, key.Bytes(), a.Budget)
	result.Keyslot += time.Since(fetched)
	return err
}

func tryNext(err error) bool {
	switch exit.Of(err) {
	case exit.WrongKey, exit.NoKey, exit.Denied, exit.Unreached:
		return true
	}
	return false
}

// mostUseful joins the failures, one that a retry may heal first, else one that ended the attempt.
func mostUseful(failures []error) error {
	if len(failures) == 1 {
		return failures[0]
	}
	first := len(failures) - 1
	for i, err := range failures {
		if exit.Of(err).Retry() {
			first = i
			break
		}
	}
	ordered := append([]error{failures[first]}, failures[:first]...)
	return joined(append(ordered, failures[first+1:]...))
}

// joined is errors.Join on one line.
type joined []error

func (j joined) Unwrap() []error { return j }
func (j joined) Error() string {
	text := j[0].Error()
	for _, err := range j[1:] {
		text += "; " + err.Error()
	}
	return text
}

// resolveTokens replaces the reference "token" by those that the header's voldek tokens hold. Whoever can write the disk
// can write a token, so keyclient takes only a configured service and a key id from it.
func resolveTokens(refs []keyclient.Ref, header *luks.Header) ([]keyclient.Ref, error) {
	var resolved []keyclient.Ref
	for _, ref := range refs {
		if ref.Scheme != keyclient.SchemeToken {
			resolved = append(resolved, ref)
			continue
		}
		found, err := tokenRefs(header)
		if err != nil {
			return nil, err
		}
		resolved = append(resolved, found...)
	}
	if len(resolved) == 0 {
		return nil, fmt.Errorf("%w: no key reference is given", keyclient.ErrNoKey)
	}
	return resolved, nil
}

func tokenRefs(header *luks.Header) ([]keyclient.Ref, error) {
	var refs []keyclient.Ref
	if header != nil {
		for _, token := range header.Tokens {
			if token.Type != TokenType {
				continue
			}
			ref, err := keyclient.RefFromToken(token.JSON)
			if err != nil {
				return nil, fmt.Errorf("token %d: %w", token.ID, err)
			}
			refs = append(refs, ref)
		}
	}
	if len(refs) == 0 {
		return nil, fmt.Errorf("key token: %w: the header has no token of type %s", keyclient.ErrNoKey, TokenType)
	}
	return refs, nil
}
