package dm

import (
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// withKey runs load while the keyring of its thread, and no other, holds key as a logon key: one that no process can read
// back. Afterwards the keyring has forgotten it.
func withKey(description string, key []byte, load func() error) (err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	id, err := unix.AddKey("logon", description, key, unix.KEY_SPEC_THREAD_KEYRING)
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("%w: the kernel keyring may not be used: %w", ErrUnavailable, err)
	}
	if err != nil {
		return fmt.Errorf("add the volume key to the kernel keyring: %w", err)
	}
	defer func() {
		if _, unlink := unix.KeyctlInt(unix.KEYCTL_UNLINK, id, unix.KEY_SPEC_THREAD_KEYRING, 0, 0); unlink != nil {
			err = errors.Join(err, fmt.Errorf("remove the volume key from the kernel keyring: %w", unlink))
		}
	}()
	return load()
}
