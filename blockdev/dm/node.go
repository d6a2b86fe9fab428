package dm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	pollEvery     = 10 * time.Millisecond
	udevPatience  = 30 * time.Second // for a link to appear; a machine that boots under load has taken seconds
	closePatience = 3 * time.Second  // for a prober such as blkid to close a device, and for a link to go
)

func nodePath(name string) string { return "/dev/mapper/" + name }

// udevRuns is libudev's own test.
func udevRuns() bool {
	_, err := os.Stat("/run/udev/control")
	return err == nil
}

// publish returns when /dev/mapper/name is the block device dev: udev makes the link where it runs, else we make a node.
func publish(ctx context.Context, name string, dev uint64) error {
	if udevRuns() {
		err := waitFor(ctx, udevPatience, func() bool { return isNode(name, dev) })
		if err != nil {
			return fmt.Errorf("wait for udev to make %s: %w", nodePath(name), err)
		}
		return nil
	}
	if isNode(name, dev) {
		return nil
	}
	if err := removeNode(name); err != nil {
		return err
	}
	if err := unix.Mknod(nodePath(name), unix.S_IFBLK|0o600, int(dev)); err != nil {
		return fmt.Errorf("make %s: %w", nodePath(name), err)
	}
	return nil
}

// unpublish returns when /dev/mapper/name is gone. What udev does not take away in time, we do.
func unpublish(ctx context.Context, name string) {
	if udevRuns() {
		_ = waitFor(ctx, closePatience, func() bool {
			_, err := os.Lstat(nodePath(name))
			return errors.Is(err, fs.ErrNotExist)
		})
	}
	_ = removeNode(name)
}

// isNode reports whether /dev/mapper/name leads to the block device dev.
func isNode(name string, dev uint64) bool {
	var st unix.Stat_t
	err := unix.Stat(nodePath(name), &st)
	return err == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK && uint64(st.Rdev) == dev
}

// removeNode removes a node or link of a mapping that is no more. Anything else by that name stays, and is an error.
func removeNode(name string) error {
	path := nodePath(name)
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if kind := st.Mode().Type(); kind != fs.ModeDevice && kind != fs.ModeSymlink {
		return fmt.Errorf("%s is in the way: neither a block device nor a link", path)
	}
	return os.Remove(path)
}

// Remove takes the mapping down and returns when its path is gone. ErrNotFound: there is no mapping by that name, or it is
// not one of dm-crypt's. ErrBusy: it is mounted, part of another device, or open; a mapping that is only open, as udev
// does for a moment to look at it, is given a few seconds first. Nothing is lost: the kernel has written back what the last
// user wrote before it let go.
func Remove(ctx context.Context, name string) error {
	ctl, err := openControl()
	if err != nil {
		return err
	}
	defer ctl.close()
	info, err := ctl.lookup(name)
	if err != nil {
		return err
	}
	if !strings.HasPrefix(info.UUID, "CRYPT-") {
		return fmt.Errorf("mapping %s: %w: it is not one of dm-crypt's", name, ErrNotFound)
	}
	var last error
	_ = waitFor(ctx, closePatience, func() bool {
		last = ctl.deviceRemove(name)
		return !errors.Is(last, unix.EBUSY) || isHeld(name)
	})
	switch {
	case errors.Is(last, unix.EBUSY):
		return ctl.busy(name)
	case errors.Is(last, ErrNotFound): // somebody else was faster
	case last != nil:
		return fmt.Errorf("remove mapping %s: %w", name, last)
	}
	unpublish(ctx, name)
	return nil
}

// busy tells how many hold the mapping.
func (ctl *control) busy(name string) error {
	info, err := ctl.lookup(name)
	if err != nil {
		return fmt.Errorf("mapping %s is %w", name, ErrBusy)
	}
	return fmt.Errorf("mapping %s is %w: opened or mounted %d times", name, ErrBusy, info.OpenCount)
}

// isHeld reports whether the mapping has an exclusive holder (a mount, swap, another mapping), which does not go away by
// itself.
func isHeld(name string) bool {
	fd, err := unix.Open(nodePath(name), unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if err == nil {
		_ = unix.Close(fd)
	}
	return errors.Is(err, unix.EBUSY)
}

// waitFor polls done at once and then every few milliseconds, until it says true, the time is up or ctx ends.
func waitFor(ctx context.Context, limit time.Duration, done func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	ticker := time.NewTicker(pollEvery)
	defer ticker.Stop()
	for !done() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
	}
	return nil
}
