package fusedev

import (
	"encoding/binary"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// connect runs a transport over a socket that keeps the borders of messages, as /dev/fuse does. The test has the kernel's end.
func connect(t *testing.T, d *disk) (kernel int) {
	t.Helper()
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	memory, err := mapBuffers()
	if err != nil {
		t.Fatal(err)
	}
	tr := newTransport(ends[1], newHandler(d), memory)
	tr.start()
	t.Cleanup(func() {
		_ = unix.Close(ends[0])
		tr.wait()
		_ = unix.Close(ends[1])
		_ = unix.Munmap(memory)
	})
	waitFor(t, func() bool { return len(tr.idle) == helpers }) // before that a reader has nobody to give a request to
	return ends[0]
}

func sendRead(t *testing.T, kernel int, unique uint64, size uint32) {
	t.Helper()
	request := append(make([]byte, inHeaderSize), ioArgs(0, size, 0)...)
	binary.LittleEndian.PutUint32(request, uint32(len(request)))
	binary.LittleEndian.PutUint32(request[4:], opRead)
	binary.LittleEndian.PutUint64(request[8:], unique)
	binary.LittleEndian.PutUint64(request[16:], volumeNode)
	if _, err := unix.Write(kernel, request); err != nil {
		t.Fatal(err)
	}
}

// While the disk keeps everyone waiting, as many requests are under way as there are buffers for them, and no more; then each
// is answered once.
func TestRequestsUnderWay(t *testing.T) {
	for _, x := range []struct {
		name  string
		size  uint32
		depth int
	}{
		{"small", 4096, readers + helpers},
		{"largest small", smallData, readers + helpers},
		{"large", smallData + 512, readers},
	} {
		t.Run(x.name, func(t *testing.T) {
			d := diskOf(t, testVolume(tempFile(t, 1<<16), 1<<16, 512))
			kernel := connect(t, d)
			hold := d.locks.lock(0, 1<<16, true)
			release := sync.OnceFunc(func() { d.locks.unlock(hold) })
			t.Cleanup(release) // a failed test must not leave everyone waiting
			sent := x.depth + 3
			for i := range sent {
				sendRead(t, kernel, uint64(i+1), x.size)
			}
			waitFor(t, func() bool { return d.locks.queued() >= 1+x.depth })
			if n := d.locks.queued() - 1; n != x.depth {
				t.Errorf("%d requests under way, want %d", n, x.depth)
			}
			release()
			seen := make(map[uint64]bool)
			answer := make([]byte, 1<<20)
			for range sent {
				n, err := unix.Read(kernel, answer)
				if err != nil || n != outHeaderSize+int(x.size) {
					t.Fatalf("answer of %d bytes, %v", n, err)
				}
				unique := binary.LittleEndian.Uint64(answer[8:])
				if seen[unique] || unique == 0 || unique > uint64(sent) {
					t.Fatalf("second or strange answer to %d", unique)
				}
				seen[unique] = true
			}
		})
	}
}
