package blockdev

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// DeviceID tells devices apart, whatever path they were opened by: the device number of a block device, or file system
// and inode of an image file.
type DeviceID struct {
	Block bool   `json:"block"`
	Dev   uint64 `json:"dev"`
	Inode uint64 `json:"inode,omitempty"`
}

// Identify returns the DeviceID behind path, following symlinks as opening it would.
func Identify(path string) (DeviceID, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return DeviceID{}, pathError(path, err)
	}
	return idOf(path, &st)
}

func idOf(path string, st *unix.Stat_t) (DeviceID, error) {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFBLK:
		return DeviceID{Block: true, Dev: uint64(st.Rdev)}, nil
	case unix.S_IFREG:
		return DeviceID{Dev: uint64(st.Dev), Inode: st.Ino}, nil
	}
	return DeviceID{}, fmt.Errorf("%s: %w: neither a block device nor a file", path, ErrNoDevice)
}

// backing is an open block device or image file and its size in bytes.
type backing struct {
	*os.File
	id   DeviceID
	size int64
}

// openBacking opens path for this process alone: O_EXCL claims a block device against mounts, dm and other O_EXCL
// opens; an image file gets an open-file-description lock, which QEMU's own locks respect. A read-only opening of a file
// shares it with other readers.
func openBacking(path string, readOnly bool) (*backing, error) {
	b, err := openShared(path, readOnly, unix.O_EXCL)
	if err != nil || b.id.Block {
		return b, err
	}
	lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET}
	if readOnly {
		lock.Type = unix.F_RDLCK
	}
	if err := unix.FcntlFlock(b.Fd(), unix.F_OFD_SETLK, &lock); err != nil {
		_ = b.Close()
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			return nil, fmt.Errorf("%s: %w: another process holds its lock", path, ErrBusy)
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return b, nil
}

// openShared opens path without a claim on it. The type is looked at before the opening, since opening a FIFO or a tape
// has effects, and again afterwards, since the path may have been changed in between.
func openShared(path string, readOnly bool, blockFlags int) (*backing, error) {
	before, err := Identify(path)
	if err != nil {
		return nil, err
	}
	flags := unix.O_RDWR | unix.O_CLOEXEC | unix.O_NONBLOCK
	if readOnly {
		flags = unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK
	}
	if before.Block {
		flags |= blockFlags
	}
	fd, err := unix.Open(path, flags, 0)
	if err != nil {
		return nil, pathError(path, err)
	}
	b, err := newBacking(fd, path, before)
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return b, nil
}

func newBacking(fd int, path string, want DeviceID) (*backing, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("stat %s: %w", path, err)
	}
	id, err := idOf(path, &st)
	if err != nil {
		return nil, err
	}
	if id != want {
		return nil, fmt.Errorf("%s: %w: it was replaced while it was being opened", path, ErrNoDevice)
	}
	// O_NONBLOCK was for the opening only; reads of disks never poll.
	if err := unix.SetNonblock(fd, false); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	size := st.Size
	if id.Block {
		if size, err = unix.Seek(fd, 0, unix.SEEK_END); err != nil {
			return nil, fmt.Errorf("size of %s: %w", path, err)
		}
	}
	return &backing{File: os.NewFile(uintptr(fd), path), id: id, size: size}, nil
}

func pathError(path string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ENXIO):
		return fmt.Errorf("%s: %w", path, ErrNoDevice)
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%s: %w: mounted, or part of another mapping", path, ErrBusy)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%s: %w", path, errNotAllowed)
	}
	return fmt.Errorf("%s: %w", path, err)
}
