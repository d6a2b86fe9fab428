package fusedev

import (
	"bytes"
	"crypto/aes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	oracle "golang.org/x/crypto/xts"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"voldek/blockdev/xts"
)

func random(seed byte, n int) []byte {
	p := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(p)
	return p
}

// tempFile makes a backing file of random bytes.
func tempFile(t testing.TB, size int64) *os.File {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(t.TempDir(), "backing"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	if _, err := f.Write(random(1, int(size))); err != nil {
		t.Fatal(err)
	}
	return f
}

func testVolume(f *os.File, size int64, sectorSize int) Volume {
	return Volume{Backing: f, Size: size, SectorSize: sectorSize, Key: random(2, 64)}
}

func diskOf(t testing.TB, v Volume) *disk {
	t.Helper()
	if err := v.check(); err != nil {
		t.Fatal(err)
	}
	cipher, err := xts.New(v.Key)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cipher.Wipe)
	return newDisk(v, cipher)
}

// plaintext decrypts a backing file with the oracle, sector by sector.
func plaintext(t testing.TB, v Volume) []byte {
	t.Helper()
	p := make([]byte, v.Size)
	if _, err := v.Backing.ReadAt(p, v.Offset); err != nil {
		t.Fatal(err)
	}
	x, err := oracle.NewCipher(aes.NewCipher, v.Key)
	if err != nil {
		t.Fatal(err)
	}
	for off := 0; off < len(p); off += v.SectorSize {
		iv := uint64(off/512) + v.IVOffset
		if v.PlainIV {
			iv &= 1<<32 - 1
		}
		x.Decrypt(p[off:off+v.SectorSize], p[off:off+v.SectorSize], iv)
	}
	return p
}

func TestDiskModel(t *testing.T) {
	for _, v := range []Volume{
		{SectorSize: 512, Size: 51 * 512, Offset: 512},
		{SectorSize: 512, Size: 51 * 512, IVOffset: 1<<32 - 20, PlainIV: true},
		{SectorSize: 512, Size: 51 * 512, IVOffset: 1<<64 - 20},
		{SectorSize: 2048, Size: 17 * 2048, IVOffset: 1<<32 - 9, PlainIV: true}, // steps over 2^32, not onto it
		{SectorSize: 4096, Size: 9 * 4096, IVOffset: 16, Offset: 4096},
	} {
		t.Run(fmt.Sprintf("%d-%x-%v", v.SectorSize, v.IVOffset, v.PlainIV), func(t *testing.T) {
			v.Backing, v.Key = tempFile(t, v.Offset+v.Size), random(3, 64)
			d := diskOf(t, v)
			model := plaintext(t, v)
			rapid.Check(t, func(t *rapid.T) {
				off := rapid.Int64Range(0, v.Size-1).Draw(t, "off")
				p := make([]byte, rapid.IntRange(1, 12000).Draw(t, "n"))
				if n, err := d.readAt(p, off); err != nil || !bytes.Equal(p[:n], model[off:min(off+int64(len(p)), v.Size)]) {
					t.Fatalf("read %d at %d: %d, %v, or not the model", len(p), off, n, err)
				}
				rand.NewChaCha8([32]byte{byte(off), byte(len(p))}).Read(p)
				want := bytes.Clone(p)
				n, err := d.writeAt(p, off)
				if err != nil || n != copy(model[off:], want) {
					t.Fatalf("write %d at %d: %d, %v", len(p), off, n, err)
				}
				for i := 0; i+16 <= n; i += 16 {
					if bytes.Equal(p[i:i+16], want[i:i+16]) {
						t.Fatalf("plaintext stayed in the buffer")
					}
				}
			})
			if !bytes.Equal(plaintext(t, v), model) {
				t.Error("the backing file is not the encryption of the model")
			}
		})
	}
}

// lostUpdates lets goroutines write neighbouring bytes of one sector, and returns how many are not there in the end.
func lostUpdates(t *testing.T, d *disk, write func(p []byte, off int64) (int, error)) (lost int) {
	t.Helper()
	const writers = 8
	want := random(byte(rand.Uint32()), 512)
	var all sync.WaitGroup
	for w := range writers {
		all.Go(func() {
			for i := w; i < len(want); i += writers {
				if _, err := write([]byte{want[i]}, int64(i)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	got := make([]byte, len(want))
	if _, err := d.readAt(got, 0); err != nil {
		t.Fatal(err)
	}
	for i := range got {
		if got[i] != want[i] {
			lost++
		}
	}
	return lost
}

func TestNoLostUpdates(t *testing.T) {
	d := diskOf(t, testVolume(tempFile(t, 4096), 4096, 4096))
	for range 20 {
		if n := lostUpdates(t, d, d.writeAt); n > 0 {
			t.Fatalf("%d of 512 bytes were lost", n)
		}
	}
	// The same without the lock must lose some, or this test proves nothing.
	for range 1000 {
		if lostUpdates(t, d, d.write) > 0 {
			return
		}
	}
	t.Error("without the range lock nothing was lost either")
}

// tornReads rewrites sectors with one byte repeated, while others read them, and counts the reads that saw a mixture.
func tornReads(t *testing.T, d *disk, write, read func(p []byte, off int64) (int, error), rounds int) (torn int) {
	t.Helper()
	stop := make(chan struct{})
	var writers sync.WaitGroup
	for w := range 2 {
		writers.Go(func() {
			p := make([]byte, 4096)
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				for j := range p {
					p[j] = byte(i*2 + w)
				}
				if _, err := write(p, 0); err != nil {
					t.Error(err)
				}
			}
		})
	}
	p := make([]byte, 4096)
	for range rounds {
		if _, err := read(p, 0); err != nil {
			t.Error(err)
		}
		if len(bytes.Trim(p, string(p[:1]))) > 0 {
			torn++
		}
	}
	close(stop)
	writers.Wait()
	return torn
}

func TestNoTornReads(t *testing.T) {
	d := diskOf(t, testVolume(tempFile(t, 4096), 4096, 4096))
	if _, err := d.writeAt(make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	if n := tornReads(t, d, d.writeAt, d.readAt, 2000); n > 0 {
		t.Errorf("%d reads saw half a write", n)
	}
	for range 200 {
		if tornReads(t, d, d.write, d.read, 2000) > 0 {
			return
		}
	}
	t.Error("without the range lock no read saw half a write either")
}

func TestErrors(t *testing.T) {
	f := tempFile(t, 8192)
	v := testVolume(f, 8192, 512)
	p := make([]byte, 512)

	d := diskOf(t, v)
	if n, err := d.writeAt(p, 8192); n != 0 || err != unix.ENOSPC {
		t.Errorf("write behind the end: %d, %v", n, err)
	}
	if n, err := d.readAt(p, 1<<62); n != 0 || err != nil {
		t.Errorf("read behind the end: %d, %v", n, err)
	}
	if err := d.punch(0, 8192); err != unix.EOPNOTSUPP {
		t.Errorf("discard: %v", err)
	}

	if err := f.Truncate(5000); err != nil {
		t.Fatal(err)
	}
	for _, x := range [][2]int64{{4608, 512}, {4608, 10}, {4990, 20}, {0, 8192}, {5120, 1}, {8191, 1}} {
		p := bytes.Repeat([]byte{9}, int(x[1]))
		if n, err := d.readAt(p, x[0]); n != 0 || errno(err) != unix.EIO {
			t.Errorf("read of %v from a truncated backing: %d, %v", x, n, err)
		}
	}
	if n, err := d.writeAt(make([]byte, 10), 5200); n != 0 || errno(err) != unix.EIO {
		t.Errorf("part of a sector that cannot be read: %d, %v", n, err)
	}
	if _, err := d.readAt(p, 4096); err != nil {
		t.Errorf("a sector before the truncation: %v", err)
	}

	v.ReadOnly = true
	if n, err := diskOf(t, v).writeAt(p, 0); n != 0 || err != unix.EROFS {
		t.Errorf("write to a read-only volume: %d, %v", n, err)
	}

	// The backing's own number comes through.
	readOnly, err := os.Open(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	defer readOnly.Close()
	v.Backing, v.ReadOnly = readOnly, false
	if _, err := diskOf(t, v).writeAt(p, 0); errno(err) != unix.EBADF {
		t.Errorf("write to a descriptor without the right: %v", err)
	}
	closed, err := os.Open(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	_ = closed.Close()
	v.Backing = closed
	if _, err := diskOf(t, v).readAt(p, 0); errno(err) != unix.EIO {
		t.Errorf("read of a closed backing: %v", err)
	}
}

func TestDiscard(t *testing.T) {
	v := testVolume(tempFile(t, 1<<20), 1<<20, 4096)
	v.Discard = true
	d := diskOf(t, v)
	before := plaintext(t, v)
	if err := d.punch(4095, 3*4096+1); err != nil { // sectors 1, 2 and 3
		t.Fatal(err)
	}
	raw := make([]byte, 1<<20)
	if _, err := v.Backing.ReadAt(raw, 0); err != nil {
		t.Fatal(err)
	}
	if len(bytes.Trim(raw[4096:4*4096], "\x00")) > 0 {
		t.Error("the sectors were not discarded")
	}
	p := make([]byte, 1<<20)
	if _, err := d.readAt(p, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(p[:4096], before[:4096]) || !bytes.Equal(p[4*4096:], before[4*4096:]) {
		t.Error("more was discarded")
	}
	if bytes.Equal(p[4096:8192], make([]byte, 4096)) {
		t.Error("a discarded sector reads as zeros, which dm-crypt does not do")
	}
	for _, x := range [][2]int64{{1, 8190}, {4097, 4096}, {1<<20 - 1, 1 << 40}} { // no whole sector
		if err := d.punch(x[0], x[1]); err != nil {
			t.Error(err)
		}
	}
	if err := d.punch(1<<20-4096, 1<<40); err != nil {
		t.Error(err)
	}
	if err := d.punch(1<<21, 4096); err != unix.EINVAL {
		t.Errorf("discard behind the end: %v", err)
	}
}

func TestFailedSyncStaysFailed(t *testing.T) {
	d := diskOf(t, testVolume(tempFile(t, 4096), 4096, 512))
	if err := d.sync(); err != nil {
		t.Fatal(err)
	}
	good := d.flush
	d.flush = func() error { return unix.EIO }
	if err := d.sync(); err != unix.EIO {
		t.Errorf("failing flush: %v", err)
	}
	d.flush = good
	if err := d.sync(); err != unix.EIO {
		t.Errorf("after a failed flush: %v", err)
	}
	p := make([]byte, 512)
	if _, err := d.writeAt(p, 0); err != nil {
		t.Errorf("write after a failed flush: %v", err)
	}
}

// A flush counts for who asked before it began, and for no one else.
func TestSyncIsShared(t *testing.T) {
	d := diskOf(t, testVolume(tempFile(t, 4096), 4096, 512))
	flushes := 0
	d.flush = func() error { flushes++; return nil }
	for i, step := range []struct{ asked, flushes int }{{0, 1}, {0, 1}, {1, 2}, {0, 2}, {1, 2}, {2, 3}} {
		if err := d.syncSince(uint64(step.asked)); err != nil || flushes != step.flushes {
			t.Fatalf("step %d: %d flushes, %v; want %d", i, flushes, err, step.flushes)
		}
	}
	d.flush = func() error { return unix.EIO }
	if d.syncSince(3) != unix.EIO || d.syncSince(0) != unix.EIO {
		t.Error("a failure was not shared")
	}
}

func TestReader(t *testing.T) {
	v := testVolume(tempFile(t, 1<<16), 1<<16, 4096)
	want := plaintext(t, v)
	r, err := NewReader(v)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(io.NewSectionReader(r, 5, 1<<20))
	if err != nil || !bytes.Equal(got, want[5:]) {
		t.Errorf("read all: %d bytes, %v", len(got), err)
	}
	if n, err := r.ReadAt(make([]byte, 10), 1<<16-4); n != 4 || err != io.EOF {
		t.Errorf("at the end: %d, %v", n, err)
	}
	if _, err := r.ReadAt(make([]byte, 10), -1); err == nil {
		t.Error("negative offset")
	}
	if err := v.Backing.Truncate(1 << 15); err != nil {
		t.Fatal(err)
	}
	if _, err := r.ReadAt(make([]byte, 10), 1<<15); !errors.Is(err, unix.EIO) {
		t.Errorf("truncated backing: %v", err)
	}
	r.Close()
	v.Key = v.Key[:5]
	if _, err := NewReader(v); err == nil {
		t.Error("key of 5 bytes")
	}
}

func TestVolumeCheck(t *testing.T) {
	good := Volume{Size: 8192, SectorSize: 512}
	if err := good.check(); err != nil {
		t.Error(err)
	}
	for _, change := range []func(v *Volume){
		func(v *Volume) { v.SectorSize = 0 },
		func(v *Volume) { v.SectorSize = 8192 },
		func(v *Volume) { v.Size = 0 },
		func(v *Volume) { v.Size = -512 },
		func(v *Volume) { v.Size = 513 },
		func(v *Volume) { v.SectorSize, v.Size = 4096, 512 },
		func(v *Volume) { v.Offset = -512 },
		func(v *Volume) { v.Offset = 100 },
		func(v *Volume) { v.Offset = 1<<63 - 512 },
	} {
		v := good
		change(&v)
		if err := v.check(); err == nil {
			t.Errorf("accepted: %+v", v)
		}
	}
}

func TestErrno(t *testing.T) {
	for _, x := range []struct {
		err  error
		want unix.Errno
	}{
		{unix.ENOSPC, unix.ENOSPC},
		{&os.PathError{Op: "write", Err: unix.EROFS}, unix.EROFS},
		{fmt.Errorf("wrapped: %w", unix.EDQUOT), unix.EDQUOT},
		{errors.New("of another kind"), unix.EIO},
		{os.ErrClosed, unix.EIO},
		{unix.Errno(0), unix.EIO},
	} {
		if got := errno(x.err); got != x.want {
			t.Errorf("errno(%v) = %v", x.err, got)
		}
	}
}
