// Package secret keeps key bytes in memory that is locked, left out of core dumps, not inherited by children and wiped
// after use. It does not know what the bytes are for.
//
// The intended use is:
//
//	key, err := secret.ReadAll(file, 8<<20)
//	if err != nil { … }
//	defer key.Wipe()
//	use(key.Bytes())
//
// What is not covered: copies that the Go runtime or a library makes while it works (registers, goroutine stacks, the
// block memory of a KDF, buffers of an HTTP or TLS connection). doc/threat-model.md lists them.
package secret

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Redacted is what every way of printing a Buffer shows.
const Redacted = "[secret]"

// ErrTooLong is returned by ReadAll for an input longer than its limit.
var ErrTooLong = errors.New("secret is too long")

var pageSize = unix.Getpagesize()

// Buffer is a fixed number of secret bytes between two guard pages. The caller that made it owns it and must Wipe it.
// Reading the bytes from several goroutines is safe; Wipe must not run while they are read.
type Buffer struct {
	mu      sync.Mutex
	mapping []byte // guard page, data pages, guard page; nil after Wipe
	data    []byte
}

// unlocked counts the buffers for which mlock failed; see Unlocked.
var unlocked atomic.Int64

// New returns a Buffer of size zero bytes. Where RLIMIT_MEMLOCK does not allow locking, the buffer is still returned and
// Unlocked reports it: refusing to open volumes would be the greater harm.
func New(size int) (*Buffer, error) {
	if size < 0 {
		panic("secret: negative size")
	}
	pages := (size + pageSize - 1) / pageSize
	mapping, err := unix.Mmap(-1, 0, (pages+2)*pageSize, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes of secret memory: %w", size, err)
	}
	b := &Buffer{mapping: mapping}
	if pages == 0 {
		return b, nil
	}
	inner := mapping[pageSize : (pages+1)*pageSize]
	if err := unix.Mprotect(inner, unix.PROT_READ|unix.PROT_WRITE); err != nil {
		_ = unix.Munmap(mapping)
		return nil, fmt.Errorf("make secret memory writable: %w", err)
	}
	if err := unix.Mlock(inner); err != nil {
		unlocked.Add(1)
	}
	// Both are hardening on top of the lock; kernels without them (before 3.4 and 4.14) still work.
	_ = unix.Madvise(inner, unix.MADV_DONTDUMP)
	_ = unix.Madvise(inner, unix.MADV_WIPEONFORK)
	// The data ends at the guard page, so that reading past it faults.
	b.data = inner[len(inner)-size : len(inner) : len(inner)]
	runtime.SetFinalizer(b, reportLeak)
	return b, nil
}

// reportLeak tells of a Buffer that was dropped without Wipe. It does not wipe: a slice of the bytes may still be in use.
func reportLeak(b *Buffer) {
	if b.mapping != nil {
		slog.Error("a secret was dropped without being wiped", "bytes", len(b.data))
	}
}

// FromBytes moves src into a new Buffer and wipes src.
func FromBytes(src []byte) (*Buffer, error) {
	defer Wipe(src)
	b, err := New(len(src))
	if err != nil {
		return nil, err
	}
	copy(b.data, src)
	return b, nil
}

// ReadAll reads r to its end into a new Buffer. More than limit bytes is ErrTooLong.
func ReadAll(r io.Reader, limit int) (*Buffer, error) {
	room, err := New(limit + 1)
	if err != nil {
		return nil, err
	}
	defer room.Wipe()
	n, err := io.ReadFull(r, room.data)
	switch {
	case err == nil:
		return nil, fmt.Errorf("%w: more than %d bytes", ErrTooLong, limit)
	case !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF):
		return nil, err
	}
	b, err := New(n)
	if err != nil {
		return nil, err
	}
	copy(b.data, room.data[:n])
	return b, nil
}

// Bytes returns the secret itself, not a copy. It must not be kept past Wipe; it panics after Wipe.
func (b *Buffer) Bytes() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.mapping == nil {
		panic("secret: used after Wipe")
	}
	return b.data
}

// Len returns the number of bytes, also after Wipe.
func (b *Buffer) Len() int { return len(b.data) }

// Clone returns a copy that the caller owns.
func (b *Buffer) Clone() (*Buffer, error) {
	c, err := New(b.Len())
	if err != nil {
		return nil, err
	}
	copy(c.data, b.Bytes())
	return c, nil
}

// Wipe overwrites the bytes and gives the memory back. It may be called on nil and more than once.
func (b *Buffer) Wipe() {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.mapping == nil {
		return
	}
	Wipe(b.data)
	mapping := b.mapping
	b.mapping = nil
	b.data = make([]byte, len(b.data)) // keeps Len; never holds a secret
	runtime.SetFinalizer(b, nil)
	_ = unix.Munmap(mapping)
}

// Wipe overwrites p with zeros. The compiler does not remove the stores: they are to memory the caller can still see.
func Wipe(p []byte) {
	clear(p)
	runtime.KeepAlive(p)
}

// String, GoString, Format, MarshalText and LogValue keep the bytes out of whatever prints a Buffer.
func (b *Buffer) String() string               { return Redacted }
func (b *Buffer) GoString() string             { return Redacted }
func (b *Buffer) Format(f fmt.State, _ rune)   { _, _ = io.WriteString(f, Redacted) }
func (b *Buffer) MarshalText() ([]byte, error) { return []byte(Redacted), nil }
func (b *Buffer) LogValue() slog.Value         { return slog.StringValue(Redacted) }

// Unlocked returns how many buffers since the start could not be locked into memory.
func Unlocked() int64 { return unlocked.Load() }
