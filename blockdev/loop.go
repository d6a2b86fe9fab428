package blockdev

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// attachLoop puts an image file behind a free loop device, since dm-crypt maps block devices only (as cryptsetup does).
// The device detaches itself when its last user, dm-crypt, lets go of it. It keeps the file's open description, and with
// it the lock on the file, also after this process has ended. The caller closes the returned file once dm-crypt holds it.
// Needs LOOP_CONFIGURE, Linux 5.8.
func attachLoop(b *backing, readOnly bool) (*os.File, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("an image file needs a loop device: %w", err)
	}
	defer control.Close()
	for {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("find a free loop device: %w", err)
		}
		loop, err := configureLoop(fmt.Sprintf("/dev/loop%d", n), b, readOnly)
		if errors.Is(err, unix.EBUSY) {
			continue // somebody else took it between the two calls
		}
		return loop, err
	}
}

func configureLoop(path string, b *backing, readOnly bool) (*os.File, error) {
	loop, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	config := unix.LoopConfig{Fd: uint32(b.Fd())}
	config.Info.Flags = unix.LO_FLAGS_AUTOCLEAR
	if readOnly {
		config.Info.Flags |= unix.LO_FLAGS_READ_ONLY
	}
	copy(config.Info.File_name[:len(config.Info.File_name)-1], b.Name())
	if err := unix.IoctlLoopConfigure(int(loop.Fd()), &config); err != nil {
		_ = loop.Close()
		return nil, fmt.Errorf("put %s behind %s: %w", b.Name(), path, err)
	}
	return loop, nil
}
