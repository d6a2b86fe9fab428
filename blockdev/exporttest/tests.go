package exporttest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func testSize(t *testing.T, r *run) {
	f := r.file(t, os.O_RDWR)
	if end, err := f.Seek(0, io.SeekEnd); err != nil || end != r.Size {
		t.Errorf("the end is at %d (%v), not %d", end, err, r.Size)
	}
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if mode := info.Mode().Perm(); mode&0o007 != 0 {
		t.Errorf("mode %o lets others in", mode)
	}
	if stat, ok := info.Sys().(*syscall.Stat_t); !ok || stat.Blksize < 512 || stat.Blksize%512 != 0 {
		t.Errorf("st_blksize %d is no I/O size", stat.Blksize)
	}
	if info.Mode().IsRegular() && info.Size() != r.Size {
		t.Errorf("st_size is %d, not %d", info.Size(), r.Size)
	}
	// The size stays as it is: a volume is not resized through its export.
	if err := unix.Ftruncate(int(f.Fd()), r.Size/2); err == nil {
		t.Error("truncated")
	}
	if end, err := f.Seek(0, io.SeekEnd); err != nil || end != r.Size {
		t.Errorf("after ftruncate the end is at %d (%v), not %d", end, err, r.Size)
	}
}

// ranges are offsets and lengths that begin and end on, before and behind the borders of sectors and pages.
func (r *run) ranges() (all [][2]int64) {
	s := int64(r.SectorSize)
	for _, at := range []int64{0, s, 3 * s, 4096, 5*4096 - s, r.Size / 2 / s * s, r.Size - 4*s} {
		for _, begin := range []int64{0, 1, s - 1} {
			for _, length := range []int64{1, 511, s - 1, s, s + 1, 2 * s, 3*s - 1} {
				if at+begin+length <= r.Size {
					all = append(all, [2]int64{at + begin, length})
				}
			}
		}
	}
	return append(all, [2]int64{0, r.Size}, [2]int64{1, r.Size - 2})
}

func testReadWrite(t *testing.T, r *run) {
	f := r.file(t, os.O_RDWR)
	for _, x := range r.ranges() {
		r.read(t, f, make([]byte, x[1]), x[0])
	}
	for i, x := range r.ranges() {
		r.write(t, f, pattern(uint64(i), int(x[1])), x[0])
		if i%5 == 0 {
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, x := range r.ranges() {
		r.read(t, f, make([]byte, x[1]), x[0])
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// At the end a read is short, then there is nothing; a write is short and then ENOSPC, as on any block device.
func testEnd(t *testing.T, r *run) {
	f := r.file(t, os.O_RDWR)
	for _, back := range []int64{0, 1, 17, 512, int64(r.SectorSize) + 1} {
		got, err := readAll(f, r.Size-back)
		if err != nil || int64(len(got)) != back {
			t.Fatalf("%d bytes before the end: read %d, %v", back, len(got), err)
		}
		r.check(t, got, r.Size-back)
	}
	for _, beyond := range []int64{0, 1, 4096, 1 << 40} {
		if n, err := f.ReadAt(make([]byte, 10), r.Size+beyond); n != 0 || err != io.EOF {
			t.Errorf("%d bytes behind the end: read %d, %v", beyond, n, err)
		}
		if n, err := f.WriteAt(make([]byte, 10), r.Size+beyond); n != 0 || !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("%d bytes behind the end: wrote %d, %v", beyond, n, err)
		}
	}
	over := pattern(1, 1000)
	n, err := unix.Pwrite(int(f.Fd()), over, r.Size-300) // os.File.WriteAt tells of all or nothing
	if n != 300 || err != nil {
		t.Errorf("write across the end: %d, %v", n, err)
	}
	copy(r.model[r.Size-300:], over)
	r.read(t, f, make([]byte, 300), r.Size-300)
	if end, err := f.Seek(0, io.SeekEnd); err != nil || end != r.Size {
		t.Errorf("the end moved to %d (%v)", end, err)
	}
}

// aligned returns n bytes of page-aligned memory, as O_DIRECT wants it.
func aligned(t testing.TB, n int) []byte {
	t.Helper()
	p, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(p) })
	return p
}

func testDirect(t *testing.T, r *run) {
	direct := r.file(t, os.O_RDWR|unix.O_DIRECT)
	plain := r.file(t, os.O_RDWR)
	s := r.SectorSize
	room := aligned(t, int(r.Size))
	r.read(t, direct, room, 0)
	for i, n := range []int{1, 2, 7, 8, 9, 33} {
		off := int64(i * 3 * s)
		p := room[:n*s]
		copy(p, pattern(uint64(i), len(p)))
		r.write(t, direct, p, off)
		r.read(t, plain, make([]byte, n*s+1), off) // no page of the past
		r.write(t, plain, pattern(uint64(i+100), n*s-1), off)
		r.read(t, direct, p, off)
	}
	last := room[:s]
	copy(last, pattern(77, s))
	r.write(t, direct, last, r.Size-int64(s))
	r.read(t, direct, room, 0)
}

func testMmap(t *testing.T, r *run) {
	f := r.file(t, os.O_RDWR)
	m, err := unix.Mmap(int(f.Fd()), 0, int(r.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	mapped := true
	defer func() {
		if mapped {
			_ = unix.Munmap(m)
		}
	}()
	r.check(t, m, 0)
	at := r.Size/2 - 5
	copy(m[at:], pattern(1, 10000))
	copy(r.model[at:], pattern(1, 10000))
	if err := unix.Msync(m, unix.MS_SYNC); err != nil {
		t.Fatal(err)
	}
	r.read(t, f, make([]byte, 10000), at)
	r.write(t, f, pattern(2, 5000), at+100)
	r.check(t, m, 0) // a write is seen through the mapping
	m[0]++
	r.model[0]++
	mapped = false
	if err := unix.Munmap(m); err != nil { // dirty pages reach the volume without msync
		t.Fatal(err)
	}
	r.read(t, f, make([]byte, 1), 0)
}

// Writers of neighbouring bytes of the same sectors do not undo each other.
func testNeighbours(t *testing.T, r *run) {
	const writers, rounds = 8, 40
	area := 3 * int64(r.SectorSize)
	errs := make(chan error, writers)
	for w := range writers {
		f := r.file(t, os.O_RDWR)
		want := pattern(uint64(w), int(area))
		for i := int64(w); i < area; i += writers {
			r.model[i] = want[i]
		}
		go func() {
			for i := range rounds {
				// In the last round each byte of ours gets its final value.
				for at := int64(w); at < area; at += writers {
					if i < rounds-1 && (at/writers+int64(i))%17 != 0 {
						continue
					}
					if _, err := f.WriteAt(want[at:at+1], at); err != nil {
						errs <- fmt.Errorf("write byte %d: %w", at, err)
						return
					}
				}
			}
			errs <- nil
		}()
	}
	for range writers {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	r.read(t, r.file(t, os.O_RDONLY), make([]byte, area), 0)
}

func testReopen(t *testing.T, r *run) {
	f := r.file(t, os.O_RDWR)
	r.write(t, f, pattern(1, 12345), 4321)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	r.checkBacking(t)
	again := r.open(t, r.Case)
	r.Path = again.Path
	f = r.file(t, os.O_RDONLY)
	got, err := readAll(f, 0)
	if err != nil {
		t.Fatal(err)
	}
	r.check(t, got, 0)
	_ = f.Close()
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
}

func testReadOnly(t *testing.T, r *run) {
	f := r.file(t, os.O_RDONLY)
	got, err := readAll(f, 0)
	if err != nil {
		t.Fatal(err)
	}
	r.check(t, got, 0)
	if w, err := os.OpenFile(r.Path, os.O_RDWR, 0); err == nil {
		_, err = w.WriteAt(bytes.Repeat([]byte{1}, 4096), 0)
		if !isRefusal(err) {
			t.Errorf("a write was not refused: %v", err)
		}
		_ = w.Close()
	} else if !isRefusal(err) {
		t.Errorf("opening for writing: %v", err)
	}
}
