package secret

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// WantedMemlock is the RLIMIT_MEMLOCK, in bytes, below which HardenProcess warns: room for the keys, passphrases and
// anti-forensic buffers of some hundred volumes.
const WantedMemlock = 64 << 20

// HardenProcess makes this process non-dumpable (no core file, no ptrace by the same user, /proc/self owned by root) and
// raises the soft RLIMIT_MEMLOCK to the hard one. The returned warning is empty, or says in one sentence why keys may be
// swapped out and what to do about it.
func HardenProcess() (warning string, err error) {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return "", fmt.Errorf("make the process non-dumpable: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return "", fmt.Errorf("forbid core files: %w", err)
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil {
		return "", fmt.Errorf("read the limit of locked memory: %w", err)
	}
	if limit.Cur < limit.Max {
		limit.Cur = limit.Max
		if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil {
			return "", fmt.Errorf("raise the limit of locked memory: %w", err)
		}
	}
	if limit.Cur < WantedMemlock {
		return fmt.Sprintf("the limit of locked memory is %d KiB, keys may be swapped out; set LimitMEMLOCK=infinity in "+
			"voldekd.service (the packaged unit has it), or: ulimit -l unlimited", limit.Cur>>10), nil
	}
	return "", nil
}
