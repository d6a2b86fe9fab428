package fusedev

import (
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// An export's memory is bounded by its buffers. Each reader has one for the largest request. When all readers are busy but
// one, that one gives a small request away, to a helper with a small buffer, and goes on reading: so many small requests
// can wait for a slow disk at once, while large ones, and any number that a fast disk answers at once, are handled where
// they were read. Nothing is allocated for a request.
const (
	readers   = 4
	smallData = 32 << 10
	helpers   = 32

	bigBuffer   = headroom + maxData
	smallBuffer = headroom + smallData
)

// mapBuffers maps the memory of all buffers. Pages are taken when they are first used.
func mapBuffers() ([]byte, error) {
	memory, err := unix.Mmap(-1, 0, readers*bigBuffer+helpers*smallBuffer, unix.PROT_READ|unix.PROT_WRITE,
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
	helpers []*helper
	idle    chan *helper
	waiting atomic.Int32 // readers waiting for a request
	reading sync.WaitGroup
	helping sync.WaitGroup
}

// helper answers one small request at a time: it is told the length of one in its buffer.
type helper struct {
	buffer buffer
	work   chan int
}

func newTransport(fd int, h *handler, memory []byte) *transport {
	t := &transport{fd: fd, handler: h, idle: make(chan *helper, helpers)}
	for range readers {
		t.big = append(t.big, memory[:bigBuffer:bigBuffer])
		memory = memory[bigBuffer:]
	}
	for range helpers {
		h := &helper{memory[:smallBuffer:smallBuffer], make(chan int)}
		t.helpers = append(t.helpers, h)
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
	for _, h := range t.helpers {
		t.helping.Go(func() { t.help(h) })
	}
	for _, b := range t.big {
		t.reading.Go(func() { t.serve(b) })
	}
}

func (t *transport) wait() {
	t.reading.Wait()
	for _, h := range t.helpers {
		close(h.work)
	}
	t.helping.Wait()
}

func (t *transport) help(h *helper) {
	for {
		t.idle <- h
		n, ok := <-h.work
		if !ok {
			return
		}
		t.answer(h.buffer, n)
	}
}

func (t *transport) serve(b buffer) {
	for {
		t.waiting.Add(1)
		n, err := unix.Read(t.fd, b.request())
		last := t.waiting.Add(-1) == 0
		switch err {
		case nil:
			if n == 0 {
				return
			}
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

// handOver gives a small request to a helper, if one is idle.
func (t *transport) handOver(b buffer, n int) bool {
	if n > ioHeaderSize+smallData || answerSize(b, n) > smallData {
		return false
	}
	select {
	case h := <-t.idle:
		copy(h.buffer.request(), b.request()[:n])
		if n > ioHeaderSize {
			clear(b.data()[:n-ioHeaderSize])
		}
		h.work <- n
		return true
	default:
		return false
	}
}

// answerSize is how much data the answer can hold.
func answerSize(b buffer, n int) uint32 {
	if n < ioHeaderSize {
		return 0
	}
	switch in := readIn(b.request()); in.Opcode {
	case opRead, opReadDir:
		return in.Size
	}
	return 0
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
