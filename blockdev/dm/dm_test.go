package dm

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
	"voldek/internal/exit"
)

func discard(fd int, span *[2]uint64) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKDISCARD, uintptr(unsafe.Pointer(span))); errno != 0 {
		return errno
	}
	return nil
}

func sample() Crypt {
	return Crypt{Name: "pg-data", UUID: "CRYPT-LUKS2-3f2a1b9c0d4e4f668a77b1c2d3e4f506-pg-data", Device: "254:16",
		Cipher: "aes-xts-plain64", KeyDescription: "cryptsetup:3f2a1b9c-0d4e-4f66-8a77-b1c2d3e4f506-d0", SectorSize: 512,
		Offset: 32768, Sectors: 2048}
}

func TestUUIDIsCryptsetups(t *testing.T) {
	for _, c := range []struct{ kind, uuid, want string }{
		{"LUKS2", "3f2a1b9c-0d4e-4f66-8a77-b1c2d3e4f506", "CRYPT-LUKS2-3f2a1b9c0d4e4f668a77b1c2d3e4f506-pg-data"},
		{"LUKS1", "3f2a1b9c-0d4e-4f66-8a77-b1c2d3e4f506", "CRYPT-LUKS1-3f2a1b9c0d4e4f668a77b1c2d3e4f506-pg-data"},
		{"PLAIN", "", "CRYPT-PLAIN-pg-data"},
	} {
		if got := UUID(c.kind, c.uuid, "pg-data"); got != c.want {
			t.Errorf("%s: %s, want %s", c.kind, got, c.want)
		}
	}
}

// The bytes of DM_TABLE_LOAD as linux/dm-ioctl.h lays them out, offset by offset.
func TestRequestBytes(t *testing.T) {
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Skip("the vector is little-endian")
	}
	line := target{start: 0, sectors: 2048, kind: "crypt", params: []byte("a b c")}
	r := request{name: "pg-data", uuid: "CRYPT-X", flags: unix.DM_READONLY_FLAG, event: udevPrimary, targets: 1,
		payload: line.encode()}
	got := r.encode(16 << 10)
	want := make([]byte, 16<<10)
	for at, field := range map[int]string{
		0:   "\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", // version 4.0.0
		12:  "\x00\x40\x00\x00",                                 // data_size 16384
		16:  "\x38\x01\x00\x00",                                 // data_start 312
		20:  "\x01\x00\x00\x00",                                 // target_count
		28:  "\x01\x80\x00\x00",                                 // flags: read-only, secure data
		32:  "\x00\x00\x40\x00",                                 // event_nr: the udev flags
		48:  "pg-data",                                          // name[128]
		176: "CRYPT-X",                                          // uuid[129], then data[7]
		320: "\x00\x08\x00\x00\x00\x00\x00\x00",                 // dm_target_spec.length, after sector_start
		332: "\x30\x00\x00\x00",                                 // next: 40 + 6 rounded up to 8
		336: "crypt",                                            // target_type[16]
		352: "a b c\x00",
	} {
		copy(want[at:], field)
	}
	if !bytes.Equal(got, want) {
		for i := range want {
			if got[i] != want[i] {
				t.Fatalf("byte %d is %#x, want %#x", i, got[i], want[i])
			}
		}
	}
	if size := uintptr(unix.DM_TABLE_LOAD >> 16 & 0x3fff); size != unix.SizeofDmIoctl {
		t.Errorf("DM_TABLE_LOAD carries %d bytes, the struct has %d", size, unix.SizeofDmIoctl)
	}
}

func TestRequestGrowsWithItsPayload(t *testing.T) {
	r := request{name: "x", payload: make([]byte, 20<<10)}
	if got := len(r.encode(16 << 10)); got != unix.SizeofDmIoctl+20<<10 {
		t.Errorf("a payload of 20 KiB makes a request of %d bytes", got)
	}
}

func TestTableRoundTrip(t *testing.T) {
	for _, change := range []func(*Crypt){
		func(*Crypt) {},
		func(c *Crypt) { c.SectorSize, c.IVOffset = 4096, 1<<63 },
		func(c *Crypt) { c.Options = Options{AllowDiscards: true, NoWriteWorkqueue: true} },
		func(c *Crypt) { c.Options, c.Cipher = Options{true, true, true, true, true}, "aes-cbc-essiv:sha256" },
	} {
		want := sample()
		change(&want)
		line := want.table(64)
		got := Info{Crypt: Crypt{Name: want.Name, UUID: want.UUID, Sectors: want.Sectors}, Target: "crypt"}
		if err := got.parseTable(line); err != nil {
			t.Fatal(err)
		}
		if got.Crypt != want || len(got.Other) != 0 || !got.same(&want) {
			t.Errorf("%s\n gives %+v, want %+v", line, got, want)
		}
	}
}

// Tables as `dmsetup table --showkeys` prints them for cryptsetup's mappings.
func TestParseForeignTables(t *testing.T) {
	hexKey := strings.Repeat("c0ffee11", 16)
	for _, c := range []struct {
		table, description string
		other              string
		ok                 bool
	}{
		{"aes-xts-plain64 " + hexKey + " 0 7:0 4096", "", "[]", true},
		{"aes-xts-plain64 :64:logon:cryptsetup:x-d0 0 7:0 4096 1 high_priority", "cryptsetup:x-d0", "[high_priority]", true},
		{"aes-xts-plain64 " + hexKey + " 8 7:0 0 2 sector_size:4096 iv_large_sectors", "", "[iv_large_sectors]", true},
		{"capi:authenc(hmac(sha256),xts(aes))-random :96:logon:cryptsetup:x-d0 0 7:0 0 1 integrity:48:aead",
			"cryptsetup:x-d0", "[integrity:48:aead]", true},
		{"cipher_null-ecb - 0 7:0 0", "", "[]", true},
		{"aes-xts-plain64 :64:user 0 7:0 0", "", "[]", true},
		{"aes-xts-plain64 " + hexKey + " 0 7:0", "", "", false},
		{"aes-xts-plain64 " + hexKey + " x 7:0 0", "", "", false},
		{"aes-xts-plain64 " + hexKey + " 0 7:0 -1", "", "", false},
		{"aes-xts-plain64 " + hexKey + " 0 7:0 0 2 allow_discards", "", "", false},
		{"aes-xts-plain64 " + hexKey + " 0 7:0 0 1 sector_size:big", "", "", false},
		{"", "", "", false},
	} {
		var info Info
		err := info.parseTable([]byte(c.table))
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", c.table, err)
		}
		if strings.Contains(fmt.Sprintf("%+v %v", info, err), "c0ffee") {
			t.Errorf("%s: the key shows in %+v, %v", c.table, info, err)
		}
		if c.ok && (info.KeyDescription != c.description || fmt.Sprint(info.Other) != c.other) {
			t.Errorf("%s: key %q, other %v", c.table, info.KeyDescription, info.Other)
		}
	}
}

// A mapping that only looks like ours is not the same: each of the fields that decide about the bytes counts.
func TestSame(t *testing.T) {
	want := sample()
	info := func() *Info { return &Info{Crypt: sample(), Target: "crypt"} }
	if !info().same(&want) {
		t.Fatal("a mapping is not the same as itself")
	}
	scheduling := info()
	scheduling.Options.NoReadWorkqueue = true
	if !scheduling.same(&want) {
		t.Error("another scheduling makes another mapping")
	}
	for what, change := range map[string]func(*Info){
		"target": func(i *Info) { i.Target = "linear" }, "other options": func(i *Info) { i.Other = []string{"iv_large_sectors"} },
		"uuid": func(i *Info) { i.UUID += "x" }, "device": func(i *Info) { i.Device = "7:1" },
		"cipher": func(i *Info) { i.Cipher = "aes-xts-plain" }, "sector size": func(i *Info) { i.SectorSize = 4096 },
		"iv offset": func(i *Info) { i.IVOffset++ }, "offset": func(i *Info) { i.Offset++ },
		"length": func(i *Info) { i.Sectors++ }, "access": func(i *Info) { i.ReadOnly = true },
	} {
		other := info()
		change(other)
		if other.same(&want) {
			t.Errorf("another %s makes the same mapping", what)
		}
	}
}

func TestCheckRefuses(t *testing.T) {
	good := sample()
	if err := good.check(64); err != nil {
		t.Fatal(err)
	}
	for what, change := range map[string]func(*Crypt){
		"empty name":                 func(c *Crypt) { c.Name = "" },
		"name with a slash":          func(c *Crypt) { c.Name = "a/b" },
		"name of 65 bytes":           func(c *Crypt) { c.Name = strings.Repeat("a", 65) },
		"dot dot":                    func(c *Crypt) { c.Name = ".." },
		"the control node":           func(c *Crypt) { c.Name = "control" },
		"name with a newline":        func(c *Crypt) { c.Name = "a\n" },
		"uuid of another tool":       func(c *Crypt) { c.UUID = "LVM-x" },
		"long uuid":                  func(c *Crypt) { c.UUID = "CRYPT-" + strings.Repeat("a", 123) },
		"device path":                func(c *Crypt) { c.Device = "/dev/vdb" },
		"device with fields":         func(c *Crypt) { c.Device = "7:0 0" },
		"cipher with fields":         func(c *Crypt) { c.Cipher = "aes-xts-plain64 00 0 7:0 0" },
		"cipher with a tab":          func(c *Crypt) { c.Cipher = "aes-xts-plain64\t" },
		"kernel crypto api cipher":   func(c *Crypt) { c.Cipher = "capi:xts(aes)-plain64" },
		"null cipher":                func(c *Crypt) { c.Cipher = "cipher_null-ecb" },
		"cipher without a mode":      func(c *Crypt) { c.Cipher = "aes" },
		"key description with space": func(c *Crypt) { c.KeyDescription = "cryptsetup:a b" },
		"key without prefix":         func(c *Crypt) { c.KeyDescription = "x" },
		"sector size 513":            func(c *Crypt) { c.SectorSize = 513 },
		"sector size 8192":           func(c *Crypt) { c.SectorSize = 8192 },
		"no sectors":                 func(c *Crypt) { c.Sectors = 0 },
		"half a sector":              func(c *Crypt) { c.SectorSize, c.Sectors = 4096, 9 },
	} {
		bad := sample()
		change(&bad)
		if bad.check(64) == nil {
			t.Errorf("%s is accepted", what)
		}
	}
	for _, size := range []int{0, 15, 65} {
		if good.check(size) == nil {
			t.Errorf("a key of %d bytes is accepted", size)
		}
	}
}

func TestUnavailableSaysWhy(t *testing.T) {
	if _, err := os.Stat(controlPath); err == nil {
		t.Skip("this host has device-mapper")
	}
	for what, err := range map[string]error{
		"available": Available(),
		"create":    func() error { _, err := Create(context.Background(), sample(), make([]byte, 64)); return err }(),
		"lookup":    func() error { _, err := Lookup("x"); return err }(),
		"list":      func() error { _, err := List(); return err }(),
		"remove":    Remove(context.Background(), "x"),
	} {
		if !errors.Is(err, ErrUnavailable) || exit.Of(err) != exit.NoBackend || !strings.Contains(err.Error(), controlPath) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// entry is one struct dm_name_list.
func entry(dev uint64, next uint32, name string) []byte {
	b := binary.NativeEndian.AppendUint64(nil, dev)
	b = binary.NativeEndian.AppendUint32(b, next)
	return append(append(b, name...), 0)
}

func TestDecodeNames(t *testing.T) {
	first := append(entry(0xfd00, 24, "one"), make([]byte, 8)...)
	for _, c := range []struct {
		what    string
		payload []byte
		want    string
		ok      bool
	}{
		{"none", make([]byte, 16), "[]", true},
		{"one", entry(0xfd00, 0, "one"), "[one]", true},
		{"two", append(first, entry(0xfd01, 0, "two")...), "[one two]", true},
		{"cut short", make([]byte, 12), "", false},
		{"next beyond the end", entry(0xfd00, 4096, "one"), "", false},
		{"next onto itself", entry(0xfd00, 1, "one"), "", false},
	} {
		got, err := decodeNames(c.payload)
		if (err == nil) != c.ok || c.ok && fmt.Sprint(got) != c.want {
			t.Errorf("%s: %v, %v", c.what, got, err)
		}
	}
}

// Whatever a table says, reading it does not panic and never keeps the key field.
func FuzzParseTable(f *testing.F) {
	good := sample()
	f.Add(good.table(64))
	f.Add([]byte("aes-xts-plain64 0123456789abcdef 0 7:0 0 2 sector_size:4096 allow_discards"))
	f.Add([]byte("aes-xts-plain64 :64:logon: 0 7:0 0 1 x"))
	f.Add([]byte("a :: 18446744073709551616 b 0"))
	f.Fuzz(func(t *testing.T, params []byte) {
		var info Info
		if info.parseTable(params) != nil {
			return
		}
		again := Info{}
		if info.KeyDescription == "" || len(info.Other) > 0 || strings.ContainsAny(info.KeyDescription, " \t\n") {
			return
		}
		if err := again.parseTable(info.table(64)); err != nil {
			t.Fatalf("%q was read, %q was not: %v", params, info.table(64), err)
		}
		if again.Crypt != info.Crypt {
			t.Fatalf("%q gives %+v, then %+v", params, info, again)
		}
	})
}

func FuzzDecode(f *testing.F) {
	r := request{name: "x", payload: (&target{sectors: 8, kind: "crypt", params: []byte("a b 0 7:0 0")}).encode()}
	f.Add(r.encode(1024))
	f.Fuzz(func(t *testing.T, buffer []byte) {
		answer, err := decode(buffer)
		if err != nil {
			return
		}
		_, _ = decodeTarget(answer.payload)
		_, _ = decodeNames(answer.payload)
		_, _ = decodeVersion(answer.payload)
	})
}
