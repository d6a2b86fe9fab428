package xts

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"testing"
	"unsafe"

	oracle "golang.org/x/crypto/xts"
	"golang.org/x/sys/unix"
)

// With the Go that builds this, the expanded keys must be in our page and nowhere behind the interface.
func TestSchedulesAreMoved(t *testing.T) {
	use(t, generic)
	for _, keyLen := range []int{16, 32} {
		key := random(1, keyLen)
		b, err := aes.NewCipher(key)
		if err != nil {
			t.Fatal(err)
		}
		if !relocatable(b, 2048) {
			t.Fatalf("%T cannot be moved: expanded keys would stay on the Go heap", b)
		}
		if relocatable(b, 100) {
			t.Error("a type larger than its room was accepted")
		}
	}
	key := random(2, 64)
	c := newCipher(t, key)
	// AES-256's schedule begins with the key itself, in an order of the implementation's choosing; its words are there.
	for half, room := range [][]byte{c.keys.page[:len(c.keys.page)/2], c.keys.page[len(c.keys.page)/2:]} {
		word, reversed := key[half*32:half*32+4], []byte{key[half*32+3], key[half*32+2], key[half*32+1], key[half*32]}
		if !bytes.Contains(room, word) && !bytes.Contains(room, reversed) {
			t.Errorf("half %d of the page does not hold the key's schedule", half)
		}
	}
}

// The expanded keys are in this process's memory where the page is while a cipher lives, and not at all after Wipe.
func TestWipeLeavesNothing(t *testing.T) { forEach(t, testWipeLeavesNothing) }

func testWipeLeavesNothing(t *testing.T) {
	key := random(3, 64)
	c, err := New(key)
	if err != nil {
		t.Fatal(err)
	}
	clear(key)
	// A piece of each schedule from amid the derived round keys, masked so that what the test remembers is not what it looks
	// for. On amd64 the assembly has each round key four times.
	want := 1
	pieces := [2][]byte{c.keys.page[100:], c.keys.page[len(c.keys.page)/2+100:]}
	if chosen != generic {
		pieces = [2][]byte{c.keys.page[7*64:], c.keys.page[(2*21+5)*64:]}
		if runtime.GOARCH == "amd64" {
			want = 4
		}
	}
	var masked [2][blockSize]byte
	for i := range masked {
		for j, b := range pieces[i][:blockSize] {
			masked[i][j] = ^b
		}
	}
	for i, m := range masked {
		if n := occurrences(t, m); n != want {
			t.Errorf("expanded key %d is in memory %d times, not %d", i, n, want)
		}
	}
	c.Wipe()
	for i, m := range masked {
		if n := occurrences(t, m); n != 0 {
			t.Errorf("expanded key %d is in memory %d times after Wipe", i, n)
		}
	}
}

// A sector's first tweak is nowhere in memory after the assembly.
func TestNoTweakStaysBehind(t *testing.T) { forEach(t, testNoTweakStaysBehind) }

func testNoTweakStaysBehind(t *testing.T) {
	if chosen == generic {
		t.Skip("the compiler may keep one on the stack")
	}
	key := random(7, 64)
	tweaks, err := aes.NewCipher(key[32:])
	if err != nil {
		t.Fatal(err)
	}
	var tweak, masked [blockSize]byte
	block{lo: 1 << 40}.store(tweak[:])
	tweaks.Encrypt(tweak[:], tweak[:])
	for i, b := range tweak[:] {
		masked[i] = ^b
	}
	clear(tweak[:])
	c := newCipher(t, key)
	buf := make([]byte, 4096)
	deep(func() { c.Encrypt(buf, buf, 1<<40, 512) })
	if n := occurrences(t, masked); n != 0 {
		t.Errorf("the tweak is in memory %d times after encrypting", n)
	}
	deep(func() { c.Decrypt(buf, buf, 1<<40, 4096) })
	if n := occurrences(t, masked); n != 0 {
		t.Errorf("the tweak is in memory %d times after decrypting", n)
	}
}

// deep calls f so far down the stack that what f leaves there is not overwritten by the calls that follow.
//
//go:noinline
func deep(f func()) {
	var room [16 << 10]byte
	f()
	runtime.KeepAlive(&room)
}

// occurrences counts in how many places of the process's writable memory, at multiples of four bytes, the complement of
// masked is. It never has the complement as a whole: a signal would store the registers that hold it.
func occurrences(t *testing.T, masked [blockSize]byte) (n int) {
	t.Helper()
	const chunk = 1 << 20
	room, err := unix.Mmap(-1, 0, chunk, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { clear(room); _ = unix.Munmap(room) }()
	m := load(masked[:])
	self := uintptr(unsafe.Pointer(&room[0]))
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open("/proc/self/mem")
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	for line := range bytes.Lines(maps) {
		var from, to uintptr
		var perms string
		if _, err := fmt.Sscanf(string(line), "%x-%x %s", &from, &to, &perms); err != nil {
			t.Fatal(err)
		}
		if perms[:2] != "rw" {
			continue
		}
		for at := from; at < to; at += chunk - blockSize + 4 {
			got, _ := mem.ReadAt(room[:min(chunk, to-at)], int64(at))
			for i := 0; i+blockSize <= got; i += 4 {
				if binary.LittleEndian.Uint64(room[i:]) != ^m.lo || binary.LittleEndian.Uint64(room[i+8:]) != ^m.hi {
					continue
				}
				if place := at + uintptr(i); place < self || place >= self+uintptr(len(room)) {
					n++
				}
			}
			clear(room)
		}
	}
	return n
}

// pointerBlock is a cipher.Block whose copy would share memory with the original.
type pointerBlock struct{ inner cipher.Block }

func (p *pointerBlock) BlockSize() int          { return p.inner.BlockSize() }
func (p *pointerBlock) Encrypt(dst, src []byte) { p.inner.Encrypt(dst, src) }
func (p *pointerBlock) Decrypt(dst, src []byte) { p.inner.Decrypt(dst, src) }

// The way for a Go whose block cannot be moved works too.
func TestUnmovableBlock(t *testing.T) {
	key := random(5, 64)
	data, _ := aes.NewCipher(key[:32])
	tweak, _ := aes.NewCipher(key[32:])
	if relocatable(&pointerBlock{data}, 2048) {
		t.Fatal("a block with a pointer would be moved")
	}
	k := &schedules{data: &pointerBlock{data}, tweak: &pointerBlock{tweak}}
	got, want := random(6, 512), random(6, 512)
	cryptGeneric(k, got, got, 9, 512, false)
	ref, _ := oracle.NewCipher(aes.NewCipher, key)
	ref.Encrypt(want, want, 9)
	if !bytes.Equal(got, want) {
		t.Error("differs")
	}
}
