// Package fusedev exports one opened volume as one file, named "volume", in a FUSE mount of its own: what is read from
// the file is decrypted, what is written is encrypted. It does not know headers, key slots or key services: it gets a
// backing file, a range of it and a key.
package fusedev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"voldek/blockdev/xts"
	"voldek/internal/exit"
)

var (
	// ErrUnavailable means that this host or this user has no FUSE.
	ErrUnavailable = exit.New(exit.NoBackend, "FUSE is not available")
	errNoHelper    = fmt.Errorf("%w: no right to mount, and fusermount3 is not installed", ErrUnavailable)
	// ErrBusy means that something still holds the export: an open file, a mapping, a loop device, a working directory.
	ErrBusy = exit.New(exit.Busy, "still in use")
)

const fileName = "volume"

// Volume is what Mount exports.
type Volume struct {
	Backing      *os.File // holds the ciphertext; the caller keeps it open until Done and closes it
	Offset, Size int64    // bytes: where the volume lies in Backing; multiples of 512 and of SectorSize
	SectorSize   int      // bytes: 512, 1024, 2048 or 4096
	IVOffset     uint64   // 512-byte sectors, added to the number of each sector (LUKS2's iv_tweak, plain's skip)
	PlainIV      bool     // aes-xts-plain: the sector counter has 32 bits; else aes-xts-plain64
	Key          []byte   // 32 or 64 bytes; only read, during Mount
	ReadOnly     bool
	// Discard passes fallocate's PUNCH_HOLE on to the backing file or device; else it is refused with EOPNOTSUPP. As with
	// dm-crypt, a discarded sector reads as garbage (the decryption of whatever the backing reads as), not as zeros, and
	// the disk shows which sectors are unused. A loop device must not be put on such an export: the kernel's loop driver
	// takes a punched hole for zeros, and file systems rely on that.
	Discard bool
	Name    string // the source column of the mount table; "" is "voldek"
}

// check refuses what the arithmetic further down relies on.
func (v Volume) check() error {
	step := int64(v.SectorSize)
	switch {
	case v.SectorSize != 512 && v.SectorSize != 1024 && v.SectorSize != 2048 && v.SectorSize != 4096:
		return fmt.Errorf("sector size %d is not 512, 1024, 2048 or 4096", v.SectorSize)
	case v.Offset < 0 || v.Offset%512 != 0:
		return fmt.Errorf("offset %d is no multiple of 512", v.Offset)
	case v.Size <= 0 || v.Size%step != 0:
		return fmt.Errorf("size %d is no multiple of the sector size %d", v.Size, v.SectorSize)
	case v.Offset+v.Size < 0:
		return fmt.Errorf("offset %d and size %d are out of range", v.Offset, v.Size)
	}
	return nil
}

// Server is a mounted export. Its methods may be called from several goroutines.
type Server struct {
	dir      string
	mount    *mount
	handler  *handler
	memory   []byte // of all buffers
	done     chan struct{}
	err      error // of the last flush; set before done is closed
	unmounts sync.Mutex
}

// Available reports whether Mount can be expected to work, or ErrUnavailable and why not.
func Available() error {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil { // fusermount3 opens it with the user's rights too
		return fmt.Errorf("%w: open /dev/fuse: %w", ErrUnavailable, err)
	}
	_ = unix.Close(fd)
	if mayMount() {
		return nil
	}
	if _, err := fusermount(); err != nil {
		return errNoHelper
	}
	return nil
}

// Mount exports v as the file "volume" in dir, an existing empty directory, and returns when it can be opened. The file
// and the mount belong to the calling user, mode 0600 or 0400, and no one else can look into the mount, except that
// root's mounts are open to root's capabilities. Where mount(2) is not permitted, fusermount3 is used.
//
// What an export uses: 4 threads that wait in the kernel, and at most about 5 MiB of buffers, which are left out of core
// dumps. The plaintext of a READ is cleared from them as soon as the kernel has it (0.01 s of CPU for a GiB), that of a
// WRITE is encrypted where it lies.
//
// A process that exports must not map the exported file into its own memory: the Go runtime takes a page fault for work,
// and can then wait for the very request it keeps from being answered. Opening, reading and writing it are safe.
func Mount(dir string, v Volume) (*Server, error) {
	s, err := newServer(dir, v)
	if err != nil {
		return nil, fmt.Errorf("export to %s: %w", dir, err)
	}
	return s, nil
}

func newServer(dir string, v Volume) (*Server, error) {
	if err := v.check(); err != nil {
		return nil, err
	}
	dir, err := emptyDir(dir)
	if err != nil {
		return nil, err
	}
	cipher, err := xts.New(v.Key)
	if err != nil {
		return nil, err
	}
	s := &Server{dir: dir, done: make(chan struct{}), handler: newHandler(newDisk(v, cipher))}
	if err := s.start(v); err != nil {
		cipher.Wipe()
		return nil, err
	}
	return s, nil
}

// emptyDir returns the absolute path of an empty directory.
func emptyDir(dir string) (string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", err
	}
	if len(entries) > 0 {
		return "", fmt.Errorf("directory is not empty: %w", unix.ENOTEMPTY)
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(dir)
}

// start mounts, answers the kernel's first request and begins to serve. When it fails everything is undone.
func (s *Server) start(v Volume) (err error) {
	if s.memory, err = mapBuffers(); err != nil {
		return err
	}
	if s.mount, err = mountAt(s.dir, v.Name, v.ReadOnly); err != nil {
		_ = unix.Munmap(s.memory)
		return err
	}
	t := newTransport(s.mount.fd, s.handler, s.memory)
	if err := t.init(); err != nil {
		_ = s.mount.detach()
		_ = unix.Close(s.mount.fd)
		_ = unix.Munmap(s.memory)
		return err
	}
	t.start()
	go s.finish(t)
	settlePoll(s.Path())
	return nil
}

// settlePoll makes the kernel learn that this file is never polled, by a system call the Go runtime knows to block. The
// runtime registers opened files with epoll in a call it takes to be instant; asking this very process, that could wait
// for a processor which the call itself occupies.
func settlePoll(path string) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	_ = unix.Close(fd)
}

// finish waits until the mount is gone, whoever took it down, and ends the export: the backing is flushed once more, the
// keys are wiped.
func (s *Server) finish(t *transport) {
	t.wait()
	_ = CleanStale(s.dir) // a connection that was aborted leaves a dead mount
	if disk := s.handler.disk; !disk.readOnly {
		if err := disk.sync(); err != nil {
			s.err = fmt.Errorf("flush %s: %w", disk.backing.Name(), err)
		}
	}
	_ = unix.Close(s.mount.fd)
	_ = unix.Munmap(s.memory)
	s.handler.disk.cipher.Wipe()
	close(s.done)
}

// Path is the file with the plaintext.
func (s *Server) Path() string { return filepath.Join(s.dir, fileName) }

// Done is closed when the export is over: unmounted by Close or Abort or by anyone else, and flushed, its keys wiped.
func (s *Server) Done() <-chan struct{} { return s.done }

// Close unmounts and then flushes the backing file. While something holds the export it returns ErrBusy, after a quarter
// of a second of patience for what is just letting go, and the export goes on. When ctx ends first, its error is returned
// and the closing goes on. Any other error is that of a flush, of now or of any time before: the export is over, and
// written data may be lost. It may be called again.
func (s *Server) Close(ctx context.Context) error {
	if err := s.unmount(ctx); err != nil {
		return err
	}
	select {
	case <-s.done:
		return s.err
	case <-ctx.Done():
		return fmt.Errorf("close %s: %w", s.dir, ctx.Err())
	}
}

func (s *Server) unmount(ctx context.Context) error {
	s.unmounts.Lock()
	defer s.unmounts.Unlock()
	patience := time.NewTimer(250 * time.Millisecond)
	defer patience.Stop()
	for {
		err := s.mount.unmount()
		if !errors.Is(err, unix.EBUSY) {
			return err
		}
		select {
		case <-s.done:
			return nil
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", s.Path(), ErrBusy)
		case <-patience.C:
			return fmt.Errorf("%s: %w", s.Path(), ErrBusy)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Abort takes the mount out of the tree at once, also while it is in use; who has the file open can go on, and Done is
// closed when the last one closes it. It is for a shutdown that cannot wait: nothing is flushed.
func (s *Server) Abort() error {
	s.unmounts.Lock()
	defer s.unmounts.Unlock()
	select {
	case <-s.done:
		return nil
	default:
	}
	return s.mount.detach()
}
