package luks

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"testing"

	"voldek/internal/exit"
)

// backing is a device that keeps count: no byte may be asked for twice. From the second time on it answers otherwise.
type backing struct {
	image
	asked  []bool // per 512-byte sector, which is as fine as Read asks
	again  int64  // offset of the first byte asked for twice, -1 for none
	broken int64  // reads of this byte fail; -1 for none
}

func newBacking(img image) *backing {
	return &backing{image: img, asked: make([]bool, len(img)/512+1), again: -1, broken: -1}
}

func (b *backing) ReadAt(p []byte, offset int64) (int, error) {
	if b.broken >= offset && b.broken < offset+int64(len(p)) {
		return 0, &os.PathError{Op: "read", Path: "backing", Err: syscall.EIO}
	}
	n, err := bytes.NewReader(b.image).ReadAt(p, offset)
	for at := offset; at < offset+int64(n); at += 512 {
		if b.asked[at/512] {
			b.again = at
			p[at-offset] ^= 1
		}
		b.asked[at/512] = true
	}
	return n, err
}

func (b *backing) open() ([]byte, error) {
	h, err := Read(b, int64(len(b.image)), Config{})
	if err != nil {
		return nil, err
	}
	k, err := h.Unlock(context.Background(), []byte(fixturePassphrase), nil)
	if err != nil {
		return nil, err
	}
	defer k.Key.Wipe()
	return bytes.Clone(k.Key.Bytes()), nil
}

func TestNothingIsReadTwice(t *testing.T) {
	long, _ := fixture(t, "luks2")
	long = append(long, make([]byte, 8<<20)...) // room for the search of a second header
	for _, c := range []struct {
		name, fixture string
		change        func(image)
		opens         bool
	}{
		{"luks1", "luks1", nil, true},
		{"luks2", "luks2", nil, true},
		{"primary zeroed", "luks2", func(img image) { clear(img[:4096]) }, true},
		{"primary damaged", "luks2", func(img image) { img[5000]++ }, true},
		{"primary with another size", "luks2", func(img image) { copy(img[8:], be64(4<<20)) }, true},
		{"secondary damaged", "luks2", func(img image) { img[20000]++ }, true},
		{"both damaged", "luks2", func(img image) { img[5000]++; img[20000]++ }, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			img, want := fixture(t, c.fixture)
			if c.fixture == "luks2" {
				img = bytes.Clone(long)
			}
			if c.change != nil {
				c.change(img)
			}
			b := newBacking(img)
			key, err := b.open()
			if c.opens && (err != nil || !bytes.Equal(key, want)) {
				t.Errorf("opens with the wrong key, or: %v", err)
			}
			if b.again >= 0 {
				t.Errorf("byte %d is read twice", b.again)
			}
		})
	}
}

// The backing must see a second read, or the test above sees nothing.
func TestBackingNoticesASecondRead(t *testing.T) {
	img, _ := fixture(t, "luks2")
	b := newBacking(img)
	if _, err := b.open(); err != nil {
		t.Fatal(err)
	}
	if _, err := b.open(); err == nil || b.again < 0 {
		t.Errorf("the second answer is the first: %v", err)
	}
}

// After Read nothing is read: the disk may be gone, or be another one.
func TestUnlockDoesNotReadTheDevice(t *testing.T) {
	for _, name := range []string{"luks1", "luks2"} {
		img, want := fixture(t, name)
		h, err := Read(bytes.NewReader(img), int64(len(img)), Config{})
		if err != nil {
			t.Fatal(err)
		}
		clear(img)
		k, err := h.Unlock(context.Background(), []byte(fixturePassphrase), nil)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if !bytes.Equal(k.Key.Bytes(), want) {
			t.Errorf("%s: another volume key", name)
		}
		k.Key.Wipe()
	}
}

func TestReadErrorsArePassedOn(t *testing.T) {
	for _, c := range []struct {
		name string
		at   int64
	}{{"luks1", 0}, {"luks1", 5000}, {"luks2", 0}, {"luks2", 5000}, {"luks2", 16384}, {"luks2", 20000}, {"luks2", 40000}} {
		t.Run(fmt.Sprint(c.name, " at ", c.at), func(t *testing.T) {
			img, _ := fixture(t, c.name)
			b := newBacking(img)
			b.broken = c.at
			if _, err := b.open(); !errors.Is(err, syscall.EIO) || exit.Of(err) != exit.Failed {
				t.Errorf("exit %d: %v", exit.Of(err), err)
			}
		})
	}
}

// A device that shrinks after its size was asked for is an I/O error, not a bad header.
func TestDeviceShorterThanItsSize(t *testing.T) {
	img, _ := fixture(t, "luks2")
	if _, err := Read(bytes.NewReader(img[:40000]), int64(len(img)), Config{}); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Error(err)
	}
}

func TestDetached(t *testing.T) {
	header, want := fixture(t, "luks2")
	header.set("segments.0.offset", "0")
	for _, c := range []struct {
		name   string
		config Config
		length int64 // 0: refused
	}{
		{"data device", Config{Detached: true, DeviceSize: 1 << 20}, 1 << 20},
		{"data device of odd size", Config{Detached: true, DeviceSize: 1<<20 + 511}, 1 << 20},
		{"empty data device", Config{Detached: true}, 0},
		{"data device under a sector", Config{Detached: true, DeviceSize: 511}, 0},
		{"not detached", Config{DeviceSize: 1 << 20}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			h, key, err := header.open(c.config, fixturePassphrase)
			if c.length == 0 {
				if exit.Of(err) != exit.BadHeader {
					t.Errorf("exit %d: %v", exit.Of(err), err)
				}
				return
			}
			if err != nil || !bytes.Equal(key, want) || h.Segment.Length != c.length || h.Segment.Offset != 0 {
				t.Errorf("length %d: %v", h.Segment.Length, err)
			}
		})
	}
	cut := header[:100<<10]
	_, _, err := cut.open(Config{Detached: true, DeviceSize: 1 << 20}, fixturePassphrase)
	if exit.Of(err) != exit.BadHeader || !strings.Contains(err.Error(), "keyslots.0.area") {
		t.Errorf("a header file without its key slots: %v", err)
	}
	header.set("segments.0.size", "2097152")
	if _, _, err := header.open(Config{Detached: true, DeviceSize: 1 << 20}, fixturePassphrase); exit.Of(err) != exit.BadHeader {
		t.Errorf("a fixed size over that of the device: %v", err)
	}
}
