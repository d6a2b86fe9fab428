package xts

import (
	"bytes"
	"crypto/aes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"testing"

	oracle "golang.org/x/crypto/xts"
	"golang.org/x/sys/unix"
)

var sectorSizes = []int{512, 1024, 2048, 4096}

// edges are first sectors where a counter of 32 or 64 bits turns over within a run, and some that are ordinary.
var edges = []uint64{0, 1, 0xff, 1<<32 - 9, 1<<32 - 1, 1 << 32, 1<<64 - 9, 1<<64 - 1}

// forEach runs a test with every implementation the processor has.
func forEach(t *testing.T, test func(t *testing.T)) {
	for _, implementation := range tiers {
		t.Run(implementation.String(), func(t *testing.T) {
			use(t, implementation)
			test(t)
		})
	}
}

// use makes New choose an implementation until the test ends.
func use(t testing.TB, implementation tier) {
	before := chosen
	chosen = implementation
	t.Cleanup(func() { chosen = before })
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func newCipher(t testing.TB, key []byte) *Cipher {
	t.Helper()
	c, err := New(key)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Wipe)
	return c
}

// The vectors of IEEE 1619-2007, annex B, shortened to their first blocks where they are longer: a block of XTS depends
// on the blocks before it only by its number. key 4 to 6 count through the digits of e and pi.
var vectors = []struct {
	name, key  string
	sector     uint64
	plain, enc string
}{
	{"1", "0000000000000000000000000000000000000000000000000000000000000000", 0,
		"0000000000000000000000000000000000000000000000000000000000000000",
		"917cf69ebd68b2ec9b9fe9a3eadda692cd43d2f59598ed858c02c2652fbf922e"},
	{"2", "1111111111111111111111111111111122222222222222222222222222222222", 0x3333333333,
		"4444444444444444444444444444444444444444444444444444444444444444",
		"c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0"},
	{"3", "fffefdfcfbfaf9f8f7f6f5f4f3f2f1f022222222222222222222222222222222", 0x3333333333,
		"4444444444444444444444444444444444444444444444444444444444444444",
		"af85336b597afc1a900b2eb21ec949d292df4c047e0b21532186a5971a227a89"},
	{"4", "2718281828459045235360287471352631415926535897932384626433832795", 0,
		"000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f",
		"27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c"},
	{"5", "2718281828459045235360287471352631415926535897932384626433832795", 1,
		"27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c",
		"264d3ca8512194fec312c8c9891f279fefdd608d0c027b60483a3fa811d65ee5"},
	{"10, AES-256", "2718281828459045235360287471352662497757247093699959574966967627" +
		"3141592653589793238462643383279502884197169399375105820974944592", 0xff,
		"000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f",
		"1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b"},
}

func TestVectors(t *testing.T) { forEach(t, testVectors) }

func testVectors(t *testing.T) {
	for _, v := range vectors {
		t.Run(v.name, func(t *testing.T) {
			c := newCipher(t, unhex(t, v.key))
			plain, want := unhex(t, v.plain), unhex(t, v.enc)
			sector := make([]byte, 512)
			copy(sector, plain)
			c.Encrypt(sector, sector, v.sector, 512)
			if got := sector[:len(want)]; !bytes.Equal(got, want) {
				t.Fatalf("encrypted to %x, not %x", got, want)
			}
			c.Decrypt(sector, sector, v.sector, 512)
			if got := sector[:len(plain)]; !bytes.Equal(got, plain) {
				t.Fatalf("decrypted to %x, not %x", got, plain)
			}
		})
	}
}

// crypter is what the differential checker compares with golang.org/x/crypto/xts.
type crypter interface {
	Encrypt(dst, src []byte, firstSector uint64, sectorSize int)
	Decrypt(dst, src []byte, firstSector uint64, sectorSize int)
}

// brokenXTS exchanges the first two blocks of each sector it encrypts. The checker must notice.
type brokenXTS struct{ *Cipher }

func (b brokenXTS) Encrypt(dst, src []byte, firstSector uint64, sectorSize int) {
	b.Cipher.Encrypt(dst, src, firstSector, sectorSize)
	for s := dst[:len(src)]; len(s) > 0; s = s[sectorSize:] {
		var first [blockSize]byte
		copy(first[:], s)
		copy(s, s[blockSize:2*blockSize])
		copy(s[blockSize:], first[:])
	}
}

// brokenStep counts sectors where it should count units of 512 bytes.
type brokenStep struct{ *Cipher }

func (b brokenStep) Encrypt(dst, src []byte, firstSector uint64, sectorSize int) {
	for ; len(src) > 0; firstSector++ {
		b.Cipher.Encrypt(dst, src[:sectorSize], firstSector, sectorSize)
		dst, src = dst[sectorSize:], src[sectorSize:]
	}
}

// differs encrypts and decrypts a run with c and with the oracle, out of place at odd addresses and then in place, and
// says where they differ, or where c wrote outside dst or into src. misalign moves both buffers, not by the same.
func differs(c crypter, key []byte, plain []byte, first uint64, sectorSize, misalign int) error {
	ref, err := oracle.NewCipher(aes.NewCipher, key)
	if err != nil {
		return err
	}
	want := make([]byte, len(plain))
	for off, sector := 0, first; off < len(plain); off += sectorSize {
		ref.Encrypt(want[off:off+sectorSize], plain[off:off+sectorSize], sector)
		sector += uint64(sectorSize / 512)
	}
	const guard = 64
	room := bytes.Repeat([]byte{0xa5}, len(plain)+misalign+2*guard)
	dst := room[guard+misalign:][:len(plain)]
	src := make([]byte, misalign*7%64+len(plain))[misalign*7%64:]
	copy(src, plain)
	guarded := func() bool {
		after := room[guard+misalign+len(plain):]
		return len(bytes.Trim(room[:guard+misalign], "\xa5")) == 0 && len(bytes.Trim(after, "\xa5")) == 0
	}

	c.Encrypt(dst, src, first, sectorSize)
	switch {
	case !bytes.Equal(dst, want):
		return fmt.Errorf("encryption differs at byte %d", mismatch(dst, want))
	case !bytes.Equal(src, plain):
		return fmt.Errorf("encryption wrote into src")
	}
	c.Decrypt(src, dst, first, sectorSize)
	switch {
	case !bytes.Equal(src, plain):
		return fmt.Errorf("decryption differs at byte %d", mismatch(src, plain))
	case !bytes.Equal(dst, want):
		return fmt.Errorf("decryption wrote into src")
	}
	c.Decrypt(dst, dst, first, sectorSize)
	if !bytes.Equal(dst, plain) {
		return fmt.Errorf("decryption in place differs at byte %d", mismatch(dst, plain))
	}
	c.Encrypt(dst, dst, first, sectorSize)
	if !bytes.Equal(dst, want) {
		return fmt.Errorf("encryption in place differs at byte %d", mismatch(dst, want))
	}
	if !guarded() {
		return fmt.Errorf("wrote outside dst")
	}
	return nil
}

func mismatch(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

func random(seed uint64, n int) []byte {
	var s [32]byte
	binary.LittleEndian.PutUint64(s[:], seed)
	p := make([]byte, n)
	_, _ = rand.NewChaCha8(s).Read(p)
	return p
}

func TestDifferential(t *testing.T) { forEach(t, testDifferential) }

func testDifferential(t *testing.T) {
	for _, keyLen := range []int{32, 64} {
		key := random(uint64(keyLen), keyLen)
		c := newCipher(t, key)
		for _, size := range sectorSizes {
			for _, first := range edges {
				for n := 0; n <= 40; n++ {
					if testing.Short() && n > 9 && n%8 > 1 {
						continue
					}
					plain := random(first+uint64(n), n*size)
					if err := differs(c, key, plain, first, size, n%17); err != nil {
						t.Fatalf("key %d, sector size %d, first sector %d, %d sectors: %v", keyLen, size, first, n, err)
					}
				}
			}
		}
	}
}

// One call of the assembly does no more than longestCall, or a part of it.
func TestLongRequest(t *testing.T) { forEach(t, testLongRequest) }

func testLongRequest(t *testing.T) {
	key := random(11, 64)
	c := newCipher(t, key)
	for _, size := range []int{512, 4096} {
		if err := differs(c, key, random(12, 9<<18+size), 1<<32-100, size, 1); err != nil {
			t.Errorf("sector size %d: %v", size, err)
		}
	}
}

func TestUnaligned(t *testing.T) { forEach(t, testUnaligned) }

func testUnaligned(t *testing.T) {
	key := random(13, 64)
	c := newCipher(t, key)
	for misalign := range 64 {
		for _, size := range sectorSizes {
			if err := differs(c, key, random(14, 5*size), 3, size, misalign); err != nil {
				t.Fatalf("sector size %d, misaligned by %d: %v", size, misalign, err)
			}
		}
	}
}

func TestDifferentialCatches(t *testing.T) { forEach(t, testDifferentialCatches) }

func testDifferentialCatches(t *testing.T) {
	key := random(1, 64)
	c := newCipher(t, key)
	if differs(brokenXTS{c}, key, random(2, 1024), 7, 512, 0) == nil {
		t.Error("exchanged blocks were not noticed")
	}
	if differs(brokenStep{c}, key, random(2, 8192), 7, 4096, 0) == nil {
		t.Error("a wrong counter step was not noticed")
	}
}

// A run split anywhere gives the same bytes as in one call.
func TestSplit(t *testing.T) { forEach(t, testSplit) }

func testSplit(t *testing.T) {
	c := newCipher(t, random(3, 64))
	plain := random(4, 32*512)
	whole := make([]byte, len(plain))
	c.Encrypt(whole, plain, 1<<32-16, 512)
	for n := range 33 {
		parts := make([]byte, len(plain))
		c.Encrypt(parts, plain[:n*512], 1<<32-16, 512)
		c.Encrypt(parts[n*512:], plain[n*512:], 1<<32-16+uint64(n), 512)
		if !bytes.Equal(parts, whole) {
			t.Fatalf("split after %d sectors differs", n)
		}
	}
}

// Reading or writing a byte outside the buffers faults here, where guard bytes could not tell of a read.
func TestGuardPages(t *testing.T) { forEach(t, testGuardPages) }

func testGuardPages(t *testing.T) {
	page := unix.Getpagesize()
	m, err := unix.Mmap(-1, 0, 3*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(m) })
	for _, off := range []int{0, 2 * page} {
		if err := unix.Mprotect(m[off:off+page], unix.PROT_NONE); err != nil {
			t.Fatal(err)
		}
	}
	c := newCipher(t, random(5, 64))
	for _, size := range sectorSizes {
		for _, p := range [][]byte{m[page : page+size], m[2*page-size : 2*page]} {
			copy(p, random(6, size))
			c.Encrypt(p, p, 1, size)
			c.Decrypt(p, p, 1, size)
			if !bytes.Equal(p, random(6, size)) {
				t.Fatalf("sector size %d: not the same after encrypting and decrypting", size)
			}
		}
	}
}

func TestKeyLengths(t *testing.T) {
	for n := range 130 {
		c, err := New(make([]byte, n))
		if ok := err == nil; ok != (n == 32 || n == 64) {
			t.Errorf("key of %d bytes: %v", n, err)
		}
		c.Wipe()
	}
}

func TestMisuse(t *testing.T) { forEach(t, testMisuse) }

func testMisuse(t *testing.T) {
	c := newCipher(t, random(7, 64))
	wiped := newCipher(t, random(7, 64))
	wiped.Wipe()
	wiped.Wipe()
	buf := make([]byte, 4096)
	for _, v := range []struct {
		want     string
		c        *Cipher
		dst, src []byte
		size     int
	}{
		{"xts: used after Wipe", wiped, buf[:512], buf[:512], 512},
		{"xts: dst shorter than src", c, buf[:512], buf[1024:2048], 512},
		{"xts: src is not a whole number of sectors", c, buf, buf[:513], 512},
		{"xts: src is not a whole number of sectors", c, buf, buf[:512], 4096},
		{"xts: sector size is not 512, 1024, 2048 or 4096", c, buf, buf, 256},
		{"xts: sector size is not 512, 1024, 2048 or 4096", c, buf, nil, 0},
		{"xts: sector size is not 512, 1024, 2048 or 4096", c, buf, buf, 8192},
		{"xts: sector size is not 512, 1024, 2048 or 4096", c, buf, buf, -512},
		{"xts: dst and src overlap in part", c, buf[1:], buf[:1024], 512},
		{"xts: dst and src overlap in part", c, buf[:1024], buf[512:1536], 512},
		{"xts: dst and src overlap in part", c, buf[:1025], buf[1023:2047], 512},
	} {
		for name, f := range map[string]func([]byte, []byte, uint64, int){"Encrypt": v.c.Encrypt, "Decrypt": v.c.Decrypt} {
			if got := panics(func() { f(v.dst, v.src, 0, v.size) }); got != v.want {
				t.Errorf("%s: panic %q, want %q", name, got, v.want)
			}
		}
	}
	// Neighbours do not overlap, a longer dst is fine, and no sectors are fine.
	c.Encrypt(buf[:1024], buf[1024:2048], 0, 512)
	c.Encrypt(buf, buf[:512], 0, 512)
	c.Decrypt(nil, nil, 0, 4096)
}

func panics(f func()) (what any) {
	defer func() { what = recover() }()
	f()
	return nil
}

func TestNoAllocation(t *testing.T) { forEach(t, testNoAllocation) }

func testNoAllocation(t *testing.T) {
	c := newCipher(t, random(8, 64))
	buf := make([]byte, 8192)
	if n := testing.AllocsPerRun(100, func() {
		c.Encrypt(buf, buf, 0, 512)
		c.Decrypt(buf, buf, 0, 4096)
	}); n != 0 {
		t.Errorf("%v allocations a call", n)
	}
}

func TestConcurrentUse(t *testing.T) { forEach(t, testConcurrentUse) }

func testConcurrentUse(t *testing.T) {
	key := random(9, 64)
	c := newCipher(t, key)
	errs := make(chan error)
	for i := range 8 {
		go func() {
			var err error
			for j := 0; j < 20 && err == nil; j++ {
				err = differs(c, key, random(uint64(i*j), 16*512), uint64(i), 512, i)
			}
			errs <- err
		}()
	}
	for range 8 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

func FuzzXTS(f *testing.F) {
	f.Add(make([]byte, 64), []byte("seed"), uint64(0), uint8(1), uint8(0), uint8(0))
	f.Add(make([]byte, 32), []byte("seed"), uint64(1<<32-1), uint8(9), uint8(3), uint8(7))
	f.Fuzz(func(t *testing.T, key, data []byte, first uint64, sectors, shape, cut uint8) {
		switch {
		case len(key) >= 64:
			key = key[:64]
		case len(key) >= 32:
			key = key[:32]
		default:
			return
		}
		size := sectorSizes[shape%4]
		plain := make([]byte, int(sectors%41)*size)
		for i := 0; i < len(plain) && len(data) > 0; i += copy(plain[i:], data) {
		}
		for _, implementation := range tiers {
			use(t, implementation)
			c, err := New(key)
			if err != nil {
				t.Fatal(err)
			}
			err = differs(split{c, int(cut)}, key, plain, first, size, int(shape>>2))
			c.Wipe()
			if err != nil {
				t.Fatalf("%v: %v", implementation, err)
			}
		}
	})
}

// split does a request in two, the first part of which has so many sectors.
type split struct {
	*Cipher
	sectors int
}

func (s split) Encrypt(dst, src []byte, first uint64, size int) {
	n := min(s.sectors*size, len(src))
	s.Cipher.Encrypt(dst, src[:n], first, size)
	s.Cipher.Encrypt(dst[n:], src[n:], first+uint64(n/512), size)
}

func (s split) Decrypt(dst, src []byte, first uint64, size int) {
	n := min(s.sectors*size, len(src))
	s.Cipher.Decrypt(dst, src[:n], first, size)
	s.Cipher.Decrypt(dst[n:], src[n:], first+uint64(n/512), size)
}

func BenchmarkXTS(b *testing.B) {
	key := random(10, 64)
	buf := make([]byte, 128<<10)
	for _, implementation := range tiers {
		use(b, implementation)
		c := newCipher(b, key)
		for _, size := range []int{512, 4096} {
			for name, crypt := range map[string]func(dst, src []byte, first uint64, size int){"encrypt": c.Encrypt, "decrypt": c.Decrypt} {
				b.Run(fmt.Sprintf("%v/%s/%d", implementation, name, size), func(b *testing.B) {
					b.SetBytes(int64(len(buf)))
					b.ReportAllocs()
					for b.Loop() {
						crypt(buf, buf, 1, size)
					}
				})
			}
		}
	}
}
