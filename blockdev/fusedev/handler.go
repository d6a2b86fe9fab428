package fusedev

import (
	"log/slog"
	"runtime/debug"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// The kernel's largest request. Its own limit is /proc/sys/fs/fuse/max_pages_limit, 256 pages unless it was changed.
const maxData = 1 << 20

// Of the protocol (include/uapi/linux/fuse.h): operations and the sizes of headers.
const (
	opRead      = 15
	opWrite     = 16
	opReadDir   = 28
	opInterrupt = 36

	inHeaderSize  = 40
	ioHeaderSize  = 80 // of READ and WRITE, the data of a WRITE comes after it
	outHeaderSize = 16
)

// buffer holds one request and its answer. Both headers lie in the page before the data, so that the data of a WRITE and
// the data of the answer to a READ begin at the same page border; there they are encrypted and decrypted in place.
type buffer []byte

const headroom = 4096

func (b buffer) request() []byte { return b[headroom-ioHeaderSize:] }
func (b buffer) answer() []byte  { return b[headroom-outHeaderSize:] }
func (b buffer) data() []byte    { return b[headroom:] }

// handler answers requests. READ and WRITE, which matter for speed, are done here; the others are left to go-fuse's
// ProtocolServer, which takes them apart and calls filesystem.
type handler struct {
	disk     *disk
	protocol *fuse.ProtocolServer
}

func newHandler(d *disk) *handler {
	options := &fuse.MountOptions{
		MaxWrite:             maxData,
		MaxBackground:        64,
		ExtraCapabilities:    fuse.CAP_ASYNC_DIO | fuse.CAP_DIRECT_IO_ALLOW_MMAP,
		DisabledCapabilities: fuse.CAP_PASSTHROUGH,
		DisableReadDirPlus:   true,
		DisableXAttrs:        true,
		Logger:               slog.NewLogLogger(slog.Default().Handler(), slog.LevelWarn),
		PanicHandler:         func(what any) fuse.Status { return status(panicked(what)) },
	}
	return &handler{d, fuse.NewProtocolServer(newFilesystem(d), options)}
}

// panicked logs a panic; who asked gets EIO, and the export goes on.
func panicked(what any) error {
	slog.Error("panic in a FUSE request", "panic", what, "stack", string(debug.Stack()))
	return unix.EIO
}

// handle answers the request in the first n bytes of b.request(), and returns the length of the answer in b.answer(): 0
// where the kernel wants none. No plaintext of a WRITE stays in b.
func (h *handler) handle(b buffer, n int) int {
	request := b.request()[:n]
	if n < inHeaderSize {
		slog.Error("FUSE request without a header", "bytes", n)
		return 0
	}
	// An answer lies over the header of its request.
	unique := header(request).Unique
	switch header(request).Opcode {
	case opRead:
		size, err := h.read(b, n)
		return reply(b, unique, size, err)
	case opWrite:
		size, err := h.write(b, n)
		return reply(b, unique, size, err)
	case opInterrupt:
		// Requests are never interrupted, and after this answer the kernel no longer asks for it. A WRITE that was
		// executed but answered with EINTR would be a lie; the Go runtime's own signals interrupt often.
		return reply(b, unique, 0, unix.ENOSYS)
	}
	size, st := h.protocol.HandleRequest([][]byte{request}, [][]byte{b.answer()})
	if !st.Ok() {
		return reply(b, unique, 0, syscall.Errno(st))
	}
	return size
}

// reply puts the header before size bytes of data.
func reply(b buffer, unique uint64, size int, err error) int {
	out := outHeader(b.answer())
	*out = fuse.OutHeader{Unique: unique, Length: uint32(outHeaderSize + size)}
	if err != nil {
		out.Length, out.Status = outHeaderSize, -int32(errno(err))
	}
	return int(out.Length)
}

func (h *handler) read(b buffer, n int) (size int, err error) {
	defer func() {
		if what := recover(); what != nil {
			size, err = 0, panicked(what)
		}
	}()
	if n < ioHeaderSize {
		return 0, unix.EINVAL
	}
	in := readIn(b.request())
	if in.NodeId != volumeNode || int64(in.Offset) < 0 || int64(in.Size) > int64(len(b.data())) {
		return 0, unix.EINVAL
	}
	return h.disk.readAt(b.data()[:in.Size], int64(in.Offset))
}

func (h *handler) write(b buffer, n int) (size int, err error) {
	defer func() {
		if what := recover(); what != nil {
			err = panicked(what)
		}
		if err != nil && n > ioHeaderSize {
			clear(b.data()[:n-ioHeaderSize])
		}
	}()
	if n < ioHeaderSize {
		return 0, unix.EINVAL
	}
	in := *writeIn(b.request())
	if in.NodeId != volumeNode || int64(in.Offset) < 0 || int64(in.Size) != int64(n-ioHeaderSize) {
		return 0, unix.EINVAL
	}
	data := b.data()[:in.Size]
	written, err := h.disk.writeAt(data, int64(in.Offset))
	if err != nil {
		return 0, err
	}
	if in.Flags&(syscall.O_SYNC|syscall.O_DSYNC) != 0 {
		if err := h.disk.sync(); err != nil {
			return 0, err
		}
	}
	clear(data[written:])
	out := writeOut(b.data())
	*out = fuse.WriteOut{Size: uint32(written)}
	return writeOutSize, nil
}
