package fusedev

import (
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// An export's memory is bounded by its buffers. Each reader has one for the largest request. When all readers are busy but
// one, that one gives a small request away, to a goroutine with a small buffer, and goes on reading: so many small
// requests can wait for a slow disk at once, while large ones, and any number that a fast disk answers at once, are
// handled where they were read.
const (
	readers   = 4
	smallData = 32 << 10
	smalls    = 32

	bigBuffer   = headroom + maxData
	smallBuffer = headroom + smallData
)

// mapBuffers maps the memory of all buffers. Pages are taken when they are first used.
func mapBuffers() ([]byte, error) {
	memory, err := unix.Mmap(-1, 0, readers*bigBuffer+smalls*smallBuffer, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("map buffers: %w", err)
	}
	_ = unix.Madvise(memory, unix.MADV_DONTDUMP)
	return memory, nil
}

// transport moves requests and answers between the kernel and handler.
type transport struct {
	fd      int
	handler *handler
	big     []buffer
	small   chan buffer  // free ones
	waiting atomic.Int32 // readers waiting for a request
	running sync.WaitGroup
}

func newTransport(fd int, h *handler, memory []byte) *transport {
	t := &transport{fd: fd, handler: h, small: make(chan buffer, smalls)}
	for range readers {
		t.big = append(t.big, memory[:bigBuffer:bigBuffer])
		memory = memory[bigBuffer:]
	}
	for range smalls {
		t.small <- memory[:smallBuffer:smallBuffer]
		memory = memory[smallBuffer:]
	}
	return t
}

// init answers the first request, INIT.
func (t *transport) init() error {
	n, err := unix.Read(t.fd, t.big[0].request())
	if err != nil {
		return fmt.Errorf("read the kernel's first request: %w", err)
	}
	t.answer(t.big[0], n)
	return nil
}

// start serves until the mount is gone; wait waits for that and for the last answer.
func (t *transport) start() {
	for _, b := range t.big {
		t.running.Go(func() { t.serve(b) })
	}
}

func (t *transport) wait() { t.running.Wait() }

func (t *transport) serve(b buffer) {
	for {
		t.waiting.Add(1)
		n, err := unix.Read(t.fd, b.request())
		last := t.waiting.Add(-1) == 0
		switch err {
		case nil:
		case unix.EINTR, unix.EAGAIN, unix.ENOENT: // ENOENT: the request was taken back
			continue
		case unix.ENODEV: // unmounted
			return
		default:
			slog.Error("FUSE connection lost", "error", err)
			return
		}
		if !last || !t.handOver(b, n) {
			t.answer(b, n)
		}
	}
}

// handOver gives a small request to a goroutine of its own, if a small buffer is free.
func (t *transport) handOver(b buffer, n int) bool {
	if n > ioHeaderSize+smallData || n >= ioHeaderSize && header(b.request()).Opcode == opRead && readIn(b.request()).Size > smallData {
		return false
	}
	select {
	case small := <-t.small:
		copy(small.request(), b.request()[:n])
		if n > ioHeaderSize {
			clear(b.data()[:n-ioHeaderSize])
		}
		t.running.Go(func() {
			t.answer(small, n)
			t.small <- small
		})
		return true
	default:
		return false
	}
}

// answer handles the request and sends the answer. ENOENT means that who asked is gone. Plaintext does not stay in b.
func (t *transport) answer(b buffer, n int) {
	size := t.handler.handle(b, n)
	if size == 0 {
		return
	}
	out := b.answer()[:size]
	if _, err := unix.Write(t.fd, out); err != nil && err != unix.ENOENT && err != unix.ENODEV {
		slog.Error("answer a FUSE request", "error", err)
	}
	clear(out)
}
