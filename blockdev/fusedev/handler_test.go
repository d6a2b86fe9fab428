package fusedev

import (
	"bytes"
	"encoding/binary"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

func waitFor(t testing.TB, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !condition(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("waited too long")
		}
	}
}

// kernel speaks the FUSE protocol to a handler, in place of the real one.
type kernel struct {
	t testing.TB
	h *handler
	b buffer
}

func newKernel(t testing.TB, d *disk) *kernel {
	k := &kernel{t, newHandler(d), make(buffer, bigBuffer)}
	init := binary.LittleEndian.AppendUint32(nil, 7) // INIT: version 7.45, readahead, flags
	for _, word := range []uint32{45, 1 << 17, 0xffffffff, 0xffffffff} {
		init = binary.LittleEndian.AppendUint32(init, word)
	}
	if out, no := k.call(26, 0, append(init, make([]byte, 44)...)); no != 0 || binary.LittleEndian.Uint32(out[20:]) != maxData {
		t.Fatalf("INIT: %v, %x", no, out)
	}
	return k
}

// call sends an operation with its arguments, and returns what the answer holds after its header.
func (k *kernel) call(op uint32, node uint64, args []byte) ([]byte, syscall.Errno) {
	k.t.Helper()
	request := make([]byte, inHeaderSize, inHeaderSize+len(args))
	binary.LittleEndian.PutUint32(request, uint32(inHeaderSize+len(args)))
	binary.LittleEndian.PutUint32(request[4:], op)
	binary.LittleEndian.PutUint64(request[8:], 0x1122334455667788)
	binary.LittleEndian.PutUint64(request[16:], node)
	return k.raw(append(request, args...))
}

func (k *kernel) raw(request []byte) ([]byte, syscall.Errno) {
	k.t.Helper()
	copy(k.b.request(), request)
	n := k.h.handle(k.b, len(request))
	if n == 0 {
		return nil, 0
	}
	out := k.b.answer()[:n]
	if n < outHeaderSize || binary.LittleEndian.Uint32(out) != uint32(n) {
		k.t.Fatalf("answer of %d bytes says it has %d", n, binary.LittleEndian.Uint32(out))
	}
	if got, sent := binary.LittleEndian.Uint64(out[8:]), binary.LittleEndian.Uint64(request[8:]); got != sent {
		k.t.Fatalf("answer to request %x, not %x", got, sent)
	}
	no := int32(binary.LittleEndian.Uint32(out[4:]))
	if no > 0 || no < -4095 || no < 0 && n != outHeaderSize {
		k.t.Fatalf("answer with error %d and %d bytes", no, n)
	}
	return out[outHeaderSize:], syscall.Errno(-no)
}

func ioArgs(off uint64, size, flags uint32) []byte {
	args := make([]byte, 40)
	binary.LittleEndian.PutUint64(args[8:], off)
	binary.LittleEndian.PutUint32(args[16:], size)
	binary.LittleEndian.PutUint32(args[32:], flags)
	return args
}

func (k *kernel) read(off uint64, size uint32) ([]byte, syscall.Errno) {
	return k.call(opRead, volumeNode, ioArgs(off, size, 0))
}

func (k *kernel) write(off uint64, p []byte, flags uint32) (uint32, syscall.Errno) {
	k.t.Helper()
	out, no := k.call(opWrite, volumeNode, append(ioArgs(off, uint32(len(p)), flags), p...))
	if no != 0 {
		return 0, no
	}
	if len(out) != writeOutSize {
		k.t.Fatalf("answer to WRITE has %d bytes", len(out))
	}
	return binary.LittleEndian.Uint32(out), 0
}

func TestHandlerSync(t *testing.T) {
	d := diskOf(t, testVolume(tempFile(t, 8192), 8192, 512))
	flushes := 0
	d.flush = func() error { flushes++; return nil }
	k := newKernel(t, d)
	for i, flags := range []uint32{0, syscall.O_DSYNC, syscall.O_SYNC} {
		if n, no := k.write(0, make([]byte, 512), flags); n != 512 || no != 0 {
			t.Fatal(n, no)
		}
		if flushes != i {
			t.Errorf("%d flushes after a write with flags %#x", flushes, flags)
		}
	}
	const fsync = 20
	if _, no := k.call(fsync, volumeNode, make([]byte, 16)); no != 0 || flushes != 3 {
		t.Errorf("FSYNC: %v, %d flushes", no, flushes)
	}
	d.flush = func() error { return unix.EIO }
	for range 2 {
		if _, no := k.call(fsync, volumeNode, make([]byte, 16)); no != syscall.EIO {
			t.Errorf("failed FSYNC: %v", no)
		}
		d.flush = func() error { return nil }
	}
	if _, no := k.write(0, make([]byte, 512), syscall.O_DSYNC); no != syscall.EIO {
		t.Errorf("synchronous write after a failed flush: %v", no)
	}
}

// A panic is an EIO to who asked, and the next request is served.
func TestHandlerPanic(t *testing.T) {
	d := diskOf(t, testVolume(tempFile(t, 8192), 8192, 512))
	k := newKernel(t, d)
	good := d.flush
	d.flush = func() error { panic("flush") }
	if _, no := k.call(20, volumeNode, make([]byte, 16)); no != syscall.EIO {
		t.Errorf("FSYNC: %v", no)
	}
	if _, no := k.write(0, make([]byte, 512), syscall.O_SYNC); no != syscall.EIO {
		t.Errorf("WRITE: %v", no)
	}
	d.flush = good
	cipher := d.cipher
	d.cipher = nil
	if _, no := k.read(0, 512); no != syscall.EIO {
		t.Errorf("READ: %v", no)
	}
	if _, no := k.write(3, make([]byte, 5), 0); no != syscall.EIO {
		t.Errorf("WRITE: %v", no)
	}
	d.cipher = cipher
	if p, no := k.read(0, 512); no != 0 || len(p) != 512 {
		t.Errorf("READ after panics: %d bytes, %v", len(p), no)
	}
}

// What a program wrote must not stay in a buffer, however the write ends.
func TestHandlerLeavesNoPlaintext(t *testing.T) {
	v := testVolume(tempFile(t, 1<<16), 1<<16, 4096)
	p := bytes.Repeat([]byte("plaintext! "), 2000)
	for name, act := range map[string]func(k *kernel){
		"aligned":   func(k *kernel) { k.write(4096, p[:8192], 0) },
		"unaligned": func(k *kernel) { k.write(100, p, 0) },
		"short":     func(k *kernel) { k.write(1<<16-5000, p, 0) },
		"behind":    func(k *kernel) { k.write(1<<16, p, 0) },
		"read-only": func(k *kernel) { k.h.disk.readOnly = true; k.write(0, p, 0) },
		"panic":     func(k *kernel) { k.h.disk.cipher = nil; k.write(0, p, 0) },
		"malformed": func(k *kernel) { k.call(opWrite, volumeNode, append(ioArgs(0, 1, 0), p...)) },
		"other":     func(k *kernel) { k.call(opWrite, rootNode, append(ioArgs(0, uint32(len(p)), 0), p...)) },
	} {
		k := newKernel(t, diskOf(t, v))
		act(k)
		if bytes.Contains(k.b, []byte("plaintext!")) {
			t.Errorf("%s: plaintext stayed", name)
		}
	}
}

func TestHandlerAttributes(t *testing.T) {
	d := diskOf(t, testVolume(tempFile(t, 8192), 8192, 512))
	k := newKernel(t, d)
	const setattr, lookup, open, fallocate = 4, 1, 14, 43
	set := func(valid uint32, size uint64) syscall.Errno {
		args := make([]byte, 88)
		binary.LittleEndian.PutUint32(args, valid)
		binary.LittleEndian.PutUint64(args[16:], size)
		_, no := k.call(setattr, volumeNode, args)
		return no
	}
	for _, x := range []struct {
		valid uint32
		size  uint64
		want  syscall.Errno
	}{
		{fuse.FATTR_SIZE, 8192, 0}, {fuse.FATTR_SIZE, 0, syscall.EPERM}, {fuse.FATTR_SIZE, 8193, syscall.EPERM},
		{fuse.FATTR_MODE, 0, syscall.EPERM}, {fuse.FATTR_UID, 0, syscall.EPERM}, {fuse.FATTR_GID, 0, syscall.EPERM},
		{fuse.FATTR_ATIME | fuse.FATTR_MTIME, 0, 0},
	} {
		if got := set(x.valid, x.size); got != x.want {
			t.Errorf("SETATTR %#x size %d: %v, want %v", x.valid, x.size, got, x.want)
		}
	}
	for name, want := range map[string]syscall.Errno{"volume": 0, "Volume": syscall.ENOENT, "": syscall.ENOENT, "volume2": syscall.ENOENT} {
		if _, no := k.call(lookup, rootNode, append([]byte(name), 0)); no != want {
			t.Errorf("LOOKUP %q: %v", name, no)
		}
	}
	if _, no := k.call(lookup, volumeNode, []byte("volume\x00")); no != syscall.ENOENT {
		t.Errorf("LOOKUP in a file: %v", no)
	}
	for _, mode := range []uint32{0, 1, 3, 16, 8} {
		args := make([]byte, 32)
		binary.LittleEndian.PutUint64(args[16:], 4096)
		binary.LittleEndian.PutUint32(args[24:], mode)
		if _, no := k.call(fallocate, volumeNode, args); no != syscall.EOPNOTSUPP {
			t.Errorf("FALLOCATE mode %d: %v", mode, no)
		}
	}
	d.readOnly = true
	for flags, want := range map[uint32]syscall.Errno{0: 0, 1: syscall.EROFS, 2: syscall.EROFS} {
		args := make([]byte, 8)
		binary.LittleEndian.PutUint32(args, flags)
		if _, no := k.call(open, volumeNode, args); no != want {
			t.Errorf("OPEN with flags %d: %v", flags, no)
		}
	}
	if _, no := k.call(opInterrupt, 0, make([]byte, 8)); no != syscall.ENOSYS {
		t.Errorf("INTERRUPT: %v", no)
	}
}

func TestHandlerDoesNotAllocate(t *testing.T) {
	k := newKernel(t, diskOf(t, testVolume(tempFile(t, 1<<16), 1<<16, 512)))
	for name, args := range map[string][]byte{
		"read":  append(make([]byte, inHeaderSize), ioArgs(100, 20000, 0)...),
		"write": append(append(make([]byte, inHeaderSize), ioArgs(100, 20000, 0)...), make([]byte, 20000)...),
	} {
		binary.LittleEndian.PutUint32(args[4:], map[string]uint32{"read": opRead, "write": opWrite}[name])
		binary.LittleEndian.PutUint64(args[16:], volumeNode)
		if n := testing.AllocsPerRun(50, func() {
			copy(k.b.request(), args)
			if k.h.handle(k.b, len(args)) <= outHeaderSize {
				t.Fatal(name)
			}
		}); n > 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

// FuzzFUSEOps takes its input for a program of operations: reads and writes are compared with a model in memory, and
// anything else must be answered in form and change nothing.
func FuzzFUSEOps(f *testing.F) {
	f.Add([]byte{0, 0, 0, 100, 0, 200, 1, 0, 0, 100, 0, 200})
	f.Add([]byte{1, 255, 255, 255, 255, 255, 0, 3, 3, 3, 3, 3, 1, 0, 1, 2, 16, 0})
	f.Add([]byte{2, 4, 1, 2, 3, 4, 5, 2, 16, 9, 9, 9, 9, 9, 2, 15, 9, 9, 9, 9, 9, 2, 28, 0, 0, 0, 0, 0})
	v := Volume{Size: 40 * 512, SectorSize: 512, Key: random(2, 64), IVOffset: 1<<32 - 5, PlainIV: true}
	v.Backing = tempFile(f, v.Size)
	model := plaintext(f, v)
	k := newKernel(f, diskOf(f, v))
	f.Fuzz(func(t *testing.T, program []byte) {
		k.t = t
		for len(program) >= 6 {
			op, arg := program[0]%3, program[1:6]
			program = program[6:]
			off := int64(binary.LittleEndian.Uint16(arg)) % (v.Size + 600)
			n := int64(binary.LittleEndian.Uint16(arg[2:])) % 6000
			rest := max(0, min(n, v.Size-off))
			switch op {
			case 0:
				p, no := k.read(uint64(off), uint32(n))
				if no != 0 || rest == 0 && len(p) > 0 || rest > 0 && !bytes.Equal(p, model[off:off+rest]) {
					t.Fatalf("read %d at %d: %d bytes, %v", n, off, len(p), no)
				}
			case 1:
				p := random(arg[4], int(n))
				written, no := k.write(uint64(off), p, 0)
				switch {
				case off >= v.Size:
					if no != syscall.ENOSPC {
						t.Fatalf("write %d at %d: %d, %v", n, off, written, no)
					}
				case no != 0 || int64(written) != rest:
					t.Fatalf("write %d at %d: %d, %v", n, off, written, no)
				default:
					copy(model[off:off+rest], p)
				}
			case 2: // any request at all, its operation and the rest of the input as they come
				op := uint32(arg[0]) % 60
				if op == opWrite || op == 26 || op == 41 { // WRITE is above, INIT comes once, NOTIFY_REPLY is no request
					op = 3
				}
				if node := uint64(arg[1]) % 4; op != opRead || node != volumeNode {
					k.call(op, node, program[:min(len(program), int(arg[2]))])
				}
			}
		}
		p, no := k.read(0, uint32(v.Size))
		if no != 0 || !bytes.Equal(p, model) {
			t.Fatalf("the volume is not the model (%v)", no)
		}
	})
}
