// Package exporttest is the one suite that every way of exporting an opened volume passes: the dm-crypt mapping and the
// FUSE file. It does not know how an export is made; it gets a function that makes one, and compares what it reads and
// what reaches the backing file with golang.org/x/crypto/xts. It needs no programs besides the test binary.
package exporttest

import (
	"bytes"
	"crypto/aes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/crypto/xts"
)

// Case is a volume to export. The backing file exists, is longer than Offset+Size and holds random bytes.
type Case struct {
	Name         string
	Backing      string // path of a regular file with the ciphertext; attach a loop device where a device is needed
	Offset, Size int64  // bytes: where the volume lies in Backing
	Key          []byte // 32 or 64 bytes, of AES-XTS
	SectorSize   int    // bytes
	IVOffset     uint64 // 512-byte sectors, added to the sector number; a multiple of SectorSize/512
	PlainIV      bool   // aes-xts-plain: the counter has 32 bits; otherwise aes-xts-plain64
	ReadOnly     bool
}

// Cipher is dm-crypt's name of the case's cipher.
func (c Case) Cipher() string {
	if c.PlainIV {
		return "aes-xts-plain"
	}
	return "aes-xts-plain64"
}

// Export is an opened volume.
type Export struct {
	Path  string       // regular file or block device with the plaintext
	Close func() error // after it the backing file holds all that was written
}

// cases are chosen for the two sector numbers that matter, 0 and 2^32, for each sector size, and for sizes that are no
// multiple of a page.
var cases = []Case{
	{Name: "512", SectorSize: 512, Key: seq(64), Size: 1<<20 + 3*512},
	{Name: "512-key32-offset", SectorSize: 512, Key: seq(32), Offset: 7 * 512, IVOffset: 12345, Size: 700 * 512},
	{Name: "512-plain64-wrap", SectorSize: 512, Key: seq(64), IVOffset: 1<<32 - 77, Size: 256 * 512},
	{Name: "512-plain-wrap", SectorSize: 512, Key: seq(64), IVOffset: 1<<32 - 77, Size: 256 * 512, PlainIV: true},
	{Name: "1024", SectorSize: 1024, Key: seq(64), Offset: 1 << 20, IVOffset: 6, Size: 333 * 1024},
	{Name: "2048", SectorSize: 2048, Key: seq(64), Offset: 4096, Size: 99 * 2048},
	{Name: "4096", SectorSize: 4096, Key: seq(64), Offset: 16 << 20, IVOffset: 8, Size: 1 << 20},
	{Name: "4096-plain-wrap", SectorSize: 4096, Key: seq(64), IVOffset: 1<<32 - 80, Size: 64 * 4096, PlainIV: true},
}

func seq(n int) []byte {
	key := make([]byte, n)
	for i := range key {
		key[i] = byte(i*7 + n)
	}
	return key
}

// Run runs the suite. open makes an export of the case, and lets t clean up what Close does not; where the exporter can't
// do a case it skips it.
func Run(t *testing.T, open func(t *testing.T, c Case) Export) {
	for _, c := range cases {
		t.Run(c.Name, func(t *testing.T) {
			t.Run("Size", func(t *testing.T) { testSize(t, begin(t, c, open)) })
			t.Run("ReadWrite", func(t *testing.T) { testReadWrite(t, begin(t, c, open)) })
			t.Run("End", func(t *testing.T) { testEnd(t, begin(t, c, open)) })
			t.Run("Direct", func(t *testing.T) { testDirect(t, begin(t, c, open)) })
			t.Run("Mmap", func(t *testing.T) { testMmap(t, begin(t, c, open)) })
			t.Run("Neighbours", func(t *testing.T) { testNeighbours(t, begin(t, c, open)) })
			t.Run("Reopen", func(t *testing.T) { testReopen(t, begin(t, c, open)) })
			t.Run("Random", func(t *testing.T) { testRandom(t, begin(t, c, open)) })
			c.ReadOnly = true
			t.Run("ReadOnly", func(t *testing.T) { testReadOnly(t, begin(t, c, open)) })
		})
	}
}

// run is one test's volume: the export, and a model of what it must hold.
type run struct {
	Case
	Export
	open   func(t *testing.T, c Case) Export
	before []byte // the backing file as it was made
	model  []byte // the plaintext
}

// begin makes the backing file and opens the export. When the test ends the export is closed, and the backing file must be
// the encryption of the model, untouched around it.
func begin(t *testing.T, c Case, open func(t *testing.T, c Case) Export) *run {
	t.Helper()
	r := &run{Case: c, open: open}
	r.Backing = filepath.Join(t.TempDir(), "backing")
	r.before = make([]byte, c.Offset+c.Size+3*4096)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(r.before)
	if err := os.WriteFile(r.Backing, r.before, 0o600); err != nil {
		t.Fatal(err)
	}
	r.model = bytes.Clone(r.before[c.Offset : c.Offset+c.Size])
	c.crypt(r.model, (*xts.Cipher).Decrypt)
	r.Export = open(t, r.Case)
	closed := false
	closeExport := r.Close
	r.Close = func() error { closed = true; return closeExport() }
	t.Cleanup(func() {
		if !closed {
			if err := r.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
		}
		r.checkBacking(t)
	})
	return r
}

// crypt is the oracle: sector by sector, the tweak counted as dm-crypt's documentation says.
func (c Case) crypt(p []byte, f func(*xts.Cipher, []byte, []byte, uint64)) {
	x, err := xts.NewCipher(aes.NewCipher, c.Key)
	if err != nil {
		panic(err)
	}
	for off := 0; off < len(p); off += c.SectorSize {
		iv := uint64(off/512) + c.IVOffset
		if c.PlainIV {
			iv = uint64(uint32(iv))
		}
		f(x, p[off:off+c.SectorSize], p[off:off+c.SectorSize], iv)
	}
}

func (r *run) checkBacking(t *testing.T) {
	t.Helper()
	got, err := os.ReadFile(r.Backing)
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Clone(r.before)
	enc := want[r.Offset : r.Offset+r.Size]
	copy(enc, r.model)
	r.crypt(enc, (*xts.Cipher).Encrypt)
	if len(got) != len(want) {
		t.Fatalf("the backing file is %d bytes long, was %d", len(got), len(want))
	}
	if i := differAt(got, want); i >= 0 {
		t.Fatalf("backing byte %d (byte %d of the volume) is not as the oracle encrypts it", i, int64(i)-r.Offset)
	}
}

// reporter is what *testing.T and *rapid.T have in common.
type reporter interface {
	Helper()
	Fatal(...any)
	Fatalf(string, ...any)
}

// check compares p, read at off, with the model.
func (r *run) check(t reporter, p []byte, off int64) {
	t.Helper()
	if i := differAt(p, r.model[off:off+int64(len(p))]); i >= 0 {
		t.Fatalf("read of %d bytes at %d differs from the model at byte %d", len(p), off, off+int64(i))
	}
}

func (r *run) file(t testing.TB, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(r.Path, flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func (r *run) write(t reporter, f *os.File, p []byte, off int64) {
	t.Helper()
	if n, err := f.WriteAt(p, off); err != nil || n != len(p) {
		t.Fatalf("write %d bytes at %d: %d, %v", len(p), off, n, err)
	}
	copy(r.model[off:], p)
}

func (r *run) read(t reporter, f *os.File, p []byte, off int64) {
	t.Helper()
	if n, err := f.ReadAt(p, off); err != nil || n != len(p) {
		t.Fatalf("read %d bytes at %d: %d, %v", len(p), off, n, err)
	}
	r.check(t, p, off)
}

func differAt(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

func pattern(seed uint64, n int) []byte {
	p := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{2, byte(seed), byte(seed >> 8), byte(seed >> 16)}).Read(p)
	return p
}

func isRefusal(err error) bool {
	return errors.Is(err, syscall.EROFS) || errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.EPERM)
}

// readAll reads from off to the end.
func readAll(f *os.File, off int64) ([]byte, error) {
	return io.ReadAll(io.NewSectionReader(f, off, 1<<62))
}
