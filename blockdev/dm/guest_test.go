package dm

import (
	"bytes"
	"context"
	"crypto/aes"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/xts"
	"golang.org/x/sys/unix"
	"voldek/blockdev/exporttest"
	"voldek/internal/exit"
	"voldek/internal/testenv"
)

// These tests need device-mapper and make mappings on loop devices. They run in the VM that the tests of vmtest boot,
// once without udev and once with it.

const (
	mapName = "dm-test"
	luksID  = "3f2a1b9c-0d4e-4f66-8a77-b1c2d3e4f506"
	mib     = 1 << 20
)

var testKey = bytes.Repeat([]byte("0123456789abcdef"), 4)

// loop returns a loop device over a new file, as major:minor, and the file.
func loop(t *testing.T, size int64) (number, file string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "backing")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, size); err != nil {
		t.Fatal(err)
	}
	return loopOver(t, file), file
}

func loopOver(t *testing.T, file string) (number string) {
	t.Helper()
	backing, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer backing.Close()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer ctl.Close()
	n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
	if err != nil {
		t.Fatal(err)
	}
	device := fmt.Sprintf("/dev/loop%d", n)
	dev, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	if err := unix.IoctlLoopConfigure(int(dev.Fd()), &unix.LoopConfig{Fd: uint32(backing.Fd())}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if dev, err := os.OpenFile(device, os.O_RDWR, 0); err == nil {
			_ = unix.IoctlSetInt(int(dev.Fd()), unix.LOOP_CLR_FD, 0)
			_ = dev.Close()
		}
	})
	return fmt.Sprintf("7:%d", n)
}

// crypt is a mapping of 1 MiB on device.
func crypt(device string) Crypt {
	return Crypt{Name: mapName, UUID: UUID("LUKS2", luksID, mapName), Device: device, Cipher: "aes-xts-plain64",
		KeyDescription: "cryptsetup:" + luksID + "-d0", SectorSize: 512, Sectors: mib / 512}
}

func mustCreate(t *testing.T, c Crypt) string {
	t.Helper()
	path, err := Create(t.Context(), c, testKey)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := Remove(context.Background(), c.Name); err != nil && !errors.Is(err, ErrNotFound) {
			t.Error(err)
		}
		nothingLeft(t, c.Name)
	})
	return path
}

// nothingLeft checks that there is no mapping, no node and no key.
func nothingLeft(t *testing.T, name string) {
	t.Helper()
	if _, err := Lookup(name); !errors.Is(err, ErrNotFound) {
		t.Errorf("mapping %s is still there: %v", name, err)
	}
	if _, err := os.Lstat("/dev/mapper/" + name); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("/dev/mapper/%s is still there: %v", name, err)
	}
	noKeyLeft(t)
}

// noKeyLeft reads the kernel's list of keys. An unlinked key is collected in the background, so it may be there a moment
// longer.
func noKeyLeft(t *testing.T) {
	t.Helper()
	var keys []byte
	err := waitFor(t.Context(), 10*time.Second, func() bool {
		keys, _ = os.ReadFile("/proc/keys")
		return !bytes.Contains(keys, []byte("cryptsetup:"))
	})
	if err != nil && t.Context().Err() == nil {
		t.Errorf("the key is still in the kernel:\n%s", keys)
	}
}

func table(t *testing.T, name string) string {
	t.Helper()
	ctl, err := openControl()
	if err != nil {
		t.Fatal(err)
	}
	defer ctl.close()
	answer, err := ctl.do(unix.DM_TABLE_STATUS, request{name: name, flags: unix.DM_STATUS_TABLE_FLAG})
	if err != nil {
		t.Fatal(err)
	}
	line, err := decodeTarget(answer.payload)
	if err != nil {
		t.Fatal(err)
	}
	return string(line.params)
}

func readFile(t *testing.T, path string, n int) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	data := make([]byte, n)
	if _, err := io.ReadFull(f, data); err != nil {
		t.Fatal(err)
	}
	return data
}

func writeDevice(t *testing.T, path string, data []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

// The suite that the FUSE export passes too. Its random sequences are fewer here, where the processor is emulated.
func TestGuestSuite(t *testing.T) {
	testenv.Guest(t)
	if err := flag.Set("rapid.checks", "5"); err != nil {
		t.Fatal(err)
	}
	exporttest.Run(t, func(t *testing.T, v exporttest.Case) exporttest.Export {
		c := crypt(loopOver(t, v.Backing))
		c.Cipher, c.SectorSize, c.IVOffset, c.ReadOnly = v.Cipher(), v.SectorSize, v.IVOffset, v.ReadOnly
		c.Offset, c.Sectors = uint64(v.Offset/512), uint64(v.Size/512)
		path, err := Create(t.Context(), c, v.Key)
		if err != nil {
			t.Fatal(err)
		}
		return exporttest.Export{Path: path, Close: func() error { return Remove(context.Background(), c.Name) }}
	})
}

func TestGuestAvailable(t *testing.T) {
	testenv.Guest(t)
	if err := Available(); err != nil {
		t.Fatal(err)
	}
}

// What the kernel wrote is what x/crypto's XTS writes, at the offset, with the tweak and for the sector size of the table.
func TestGuestCiphertext(t *testing.T) {
	testenv.Guest(t)
	plain := make([]byte, 64<<10)
	for i := range plain {
		plain[i] = byte(i * i >> 3)
	}
	for _, v := range []struct {
		sectorSize int
		ivOffset   uint64
		offset     uint64
	}{{512, 0, 0}, {512, 7, 16}, {4096, 0, 64}, {4096, 8, 0}, {1024, 1<<32 - 2, 2}} {
		t.Run(fmt.Sprint(v), func(t *testing.T) {
			number, file := loop(t, 2*mib)
			c := crypt(number)
			c.SectorSize, c.IVOffset, c.Offset = v.sectorSize, v.ivOffset, v.offset
			writeDevice(t, mustCreate(t, c), plain)
			reference, err := xts.NewCipher(aes.NewCipher, testKey)
			if err != nil {
				t.Fatal(err)
			}
			want := make([]byte, len(plain))
			for at := 0; at < len(plain); at += v.sectorSize {
				reference.Encrypt(want[at:at+v.sectorSize], plain[at:at+v.sectorSize], v.ivOffset+uint64(at/512))
			}
			got := readFile(t, file, int(v.offset)*512+len(plain))[v.offset*512:]
			if !bytes.Equal(got, want) {
				t.Error("the ciphertext on the backing device is another")
			}
		})
	}
}

func TestGuestCiphers(t *testing.T) {
	testenv.Guest(t)
	plain := bytes.Repeat([]byte("plaintext"), 4096)[:8192]
	for cipher, keySize := range map[string]int{
		"aes-xts-plain64": 32, "aes-xts-plain": 64, "aes-cbc-essiv:sha256": 32, "aes-cbc-plain64": 16,
	} {
		t.Run(cipher, func(t *testing.T) {
			number, file := loop(t, 2*mib)
			c := crypt(number)
			c.Cipher = cipher
			open := func() string {
				path, err := Create(t.Context(), c, testKey[:keySize])
				if err != nil {
					t.Fatal(err)
				}
				return path
			}
			writeDevice(t, open(), plain)
			if err := Remove(t.Context(), mapName); err != nil {
				t.Fatal(err)
			}
			if bytes.Contains(readFile(t, file, 8192), []byte("plaintext")) {
				t.Error("the backing device holds plaintext")
			}
			if got := readFile(t, open(), 8192); !bytes.Equal(got, plain) {
				t.Error("other bytes came back")
			}
			if err := Remove(t.Context(), mapName); err != nil {
				t.Fatal(err)
			}
			nothingLeft(t, mapName)
		})
	}
	t.Run("one that no kernel has", func(t *testing.T) {
		number, _ := loop(t, 2*mib)
		c := crypt(number)
		c.Cipher = "rot13-xts-plain64"
		if _, err := Create(t.Context(), c, testKey); err == nil {
			t.Error("the mapping was made")
		}
		nothingLeft(t, mapName)
	})
}

func TestGuestTableShowsNoKey(t *testing.T) {
	testenv.Guest(t)
	number, _ := loop(t, 2*mib)
	c := crypt(number)
	c.SectorSize, c.Options = 4096, Options{true, true, true, true, true}
	path := mustCreate(t, c)
	want := "aes-xts-plain64 :64:logon:cryptsetup:" + luksID + "-d0 0 " + number + " 0 6 allow_discards same_cpu_crypt " +
		"submit_from_crypt_cpus no_read_workqueue no_write_workqueue sector_size:4096"
	if got := table(t, mapName); got != want {
		t.Errorf("table\n %s, want\n %s", got, want)
	}
	noKeyLeft(t)
	info, err := Lookup(mapName)
	if err != nil {
		t.Fatal(err)
	}
	if info.Crypt != c || info.Path != path || info.OpenCount != 0 || !info.Active || len(info.Other) != 0 {
		t.Errorf("lookup gives %+v, want %+v", info, c)
	}
	if !isNode(mapName, unix.Mkdev(info.Major, info.Minor)) {
		t.Errorf("%s is not device %d:%d", path, info.Major, info.Minor)
	}
}

// The table of another tool may hold a key in hex. Lookup and List go over it without keeping it.
func TestGuestForeignKeyIsNotShown(t *testing.T) {
	testenv.Guest(t)
	number, _ := loop(t, 2*mib)
	c := crypt(number)
	foreign(t, &c, "crypt", fmt.Sprintf("%s %x 0 %s 0 1 allow_discards", c.Cipher, testKey, c.Device))
	list, err := List()
	if err != nil {
		t.Fatal(err)
	}
	if len(list) != 1 || list[0].Name != mapName || list[0].KeyDescription != "" || !list[0].Options.AllowDiscards {
		t.Errorf("list gives %+v", list)
	}
	if shown := fmt.Sprintf("%+v", list); strings.Contains(shown, fmt.Sprintf("%x", testKey[:4])) {
		t.Errorf("the key is shown: %s", shown)
	}
	if path, err := Create(t.Context(), func() Crypt { c.Options = Options{}; return c }(), testKey); err != nil {
		t.Errorf("a mapping of the same volume, made by another tool: %q, %v", path, err)
	}
}

// foreign makes a mapping with any table, as another tool would.
func foreign(t *testing.T, c *Crypt, kind, params string) {
	t.Helper()
	ctl, err := openControl()
	if err != nil {
		t.Fatal(err)
	}
	defer ctl.close()
	dev, err := ctl.deviceCreate(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctl, err := openControl()
		if err != nil {
			t.Fatal(err)
		}
		defer ctl.close()
		if err := ctl.deviceRemove(c.Name); err != nil {
			t.Error(err)
		}
		unpublish(context.Background(), c.Name)
	})
	line := target{sectors: c.Sectors, kind: kind, params: []byte(params)}
	if _, err := ctl.do(unix.DM_TABLE_LOAD, request{name: c.Name, targets: 1, payload: line.encode()}); err != nil {
		t.Fatal(err)
	}
	if err := ctl.resume(c.Name); err != nil {
		t.Fatal(err)
	}
	if err := publish(t.Context(), c.Name, dev); err != nil {
		t.Fatal(err)
	}
}

func TestGuestOtherTargetsAreLeftAlone(t *testing.T) {
	testenv.Guest(t)
	number, _ := loop(t, 2*mib)
	c := crypt(number)
	c.UUID = "LVM-abc"
	foreign(t, &c, "linear", number+" 0")
	if info, err := Lookup(mapName); err != nil || info.Target != "linear" {
		t.Errorf("lookup gives %+v, %v", info, err)
	}
	if list, err := List(); err != nil || len(list) != 0 {
		t.Errorf("list gives %+v, %v", list, err)
	}
	if err := Remove(t.Context(), mapName); !errors.Is(err, ErrNotFound) {
		t.Errorf("remove gives %v, want ErrNotFound", err)
	}
	other, _ := loop(t, 2*mib)
	if _, err := Create(t.Context(), crypt(other), testKey); !errors.Is(err, ErrBusy) {
		t.Errorf("create over it gives %v, want ErrBusy", err)
	}
	if _, err := Lookup(mapName); err != nil {
		t.Errorf("it was removed: %v", err)
	}
}

func TestGuestCreateIsIdempotent(t *testing.T) {
	testenv.Guest(t)
	number, _ := loop(t, 2*mib)
	c := crypt(number)
	path := mustCreate(t, c)
	again, err := Create(t.Context(), c, testKey)
	if err != nil || again != path {
		t.Errorf("the second time: %q, %v", again, err)
	}
	second, _ := loop(t, 2*mib)
	for what, change := range map[string]func(*Crypt){
		"device":      func(c *Crypt) { c.Device = second },
		"uuid":        func(c *Crypt) { c.UUID = UUID("LUKS1", luksID, mapName) },
		"cipher":      func(c *Crypt) { c.Cipher = "aes-xts-plain" },
		"offset":      func(c *Crypt) { c.Offset = 8 },
		"length":      func(c *Crypt) { c.Sectors = 8 },
		"sector size": func(c *Crypt) { c.SectorSize = 4096 },
		"iv offset":   func(c *Crypt) { c.IVOffset = 8 },
		"access":      func(c *Crypt) { c.ReadOnly = true },
	} {
		other := c
		change(&other)
		if _, err := Create(t.Context(), other, testKey); !errors.Is(err, ErrBusy) || exit.Of(err) != exit.Busy {
			t.Errorf("other %s: %v, want ErrBusy", what, err)
		}
	}
	// The kernel itself would let two mappings share a device.
	sameDevice := c
	sameDevice.Name, sameDevice.UUID = "dm-test2", UUID("LUKS2", luksID, "dm-test2")
	if _, err := Create(t.Context(), sameDevice, testKey); !errors.Is(err, ErrBusy) {
		t.Errorf("the same device under another name: %v, want ErrBusy", err)
	}
	nothingLeft(t, "dm-test2")
	if info, err := Lookup(mapName); err != nil || info.Device != number {
		t.Errorf("the first mapping is now %+v, %v", info, err)
	}
}

func TestGuestConcurrentCreateMakesOneMapping(t *testing.T) {
	testenv.Guest(t)
	number, _ := loop(t, 2*mib)
	c := crypt(number)
	path := nodePath(mapName)
	var group sync.WaitGroup
	for range 20 {
		group.Go(func() {
			if got, err := Create(t.Context(), c, testKey); err != nil || got != path {
				t.Errorf("create gives %q, %v", got, err)
			}
		})
	}
	group.Wait()
	if list, err := List(); err != nil || len(list) != 1 {
		t.Errorf("list gives %+v, %v", list, err)
	}
	if err := Remove(t.Context(), mapName); err != nil {
		t.Error(err)
	}
	nothingLeft(t, mapName)
}

// Each ioctl of Create fails in turn, until a run has none left to fail: nothing remains of any failed one.
func TestGuestEveryFailureCleansUp(t *testing.T) {
	testenv.Guest(t)
	number, _ := loop(t, 2*mib)
	injected := errors.New("injected")
	for n := 1; ; n++ {
		ctl, err := openControl()
		if err != nil {
			t.Fatal(err)
		}
		calls := 0
		ctl.call = func(fd int, command uint32, buffer []byte) error {
			if calls++; calls == n {
				return injected
			}
			return ioctl(fd, command, buffer)
		}
		c := crypt(number)
		_, err = ctl.create(t.Context(), &c, testKey)
		ctl.close()
		if err == nil {
			if n != 4 {
				t.Errorf("creation took %d ioctls, want 3", n-1)
			}
			break
		}
		if !errors.Is(err, injected) {
			t.Fatalf("ioctl %d: %v", n, err)
		}
		nothingLeft(t, mapName)
	}
	if err := Remove(t.Context(), mapName); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, mapName)
}

func TestGuestRefusedByTheKernel(t *testing.T) {
	testenv.Guest(t)
	number, _ := loop(t, 2*mib)
	for what, change := range map[string]func(*Crypt){
		"longer than the device":     func(c *Crypt) { c.Sectors = 8 * mib / 512 },
		"beyond the device":          func(c *Crypt) { c.Offset = 1 << 40 },
		"a device that is not there": func(c *Crypt) { c.Device = "240:9" },
	} {
		c := crypt(number)
		change(&c)
		_, err := Create(t.Context(), c, testKey)
		if err == nil || errors.Is(err, ErrBusy) || strings.Contains(err.Error(), "0123456789") {
			t.Errorf("%s: %v", what, err)
		}
		nothingLeft(t, mapName)
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Create(cancelled, crypt(number), testKey); exit.Of(err) != exit.Interrupted {
		t.Errorf("cancelled: %v", err)
	}
	nothingLeft(t, mapName)
	if udevRuns() {
		return // there a file in the way is udev's to deal with
	}
	if err := os.WriteFile(nodePath(mapName), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Create(t.Context(), crypt(number), testKey); err == nil {
		t.Error("a file in the way of the node was overwritten")
	}
	if err := os.Remove(nodePath(mapName)); err != nil {
		t.Error(err)
	}
	nothingLeft(t, mapName)
}

// A process killed between the creation and the table leaves a mapping without one.
func TestGuestLeftoverIsReplaced(t *testing.T) {
	testenv.Guest(t)
	number, _ := loop(t, 2*mib)
	c := crypt(number)
	ctl, err := openControl()
	if err != nil {
		t.Fatal(err)
	}
	defer ctl.close()
	if _, err := ctl.deviceCreate(&c); err != nil {
		t.Fatal(err)
	}
	if info, err := Lookup(mapName); err != nil || info.Active || info.Target != "" {
		t.Errorf("the leftover is %+v, %v", info, err)
	}
	mustCreate(t, c)
	if info, err := Lookup(mapName); err != nil || !info.Active {
		t.Errorf("the mapping is %+v, %v", info, err)
	}
}

func TestGuestStaleNodeIsReplaced(t *testing.T) {
	testenv.Guest(t)
	if udevRuns() {
		return // nodes are udev's there
	}
	if err := unix.Mknod(nodePath(mapName), unix.S_IFBLK|0o600, int(unix.Mkdev(7, 99))); err != nil {
		t.Fatal(err)
	}
	number, _ := loop(t, 2*mib)
	path := mustCreate(t, crypt(number))
	readFile(t, path, 512)
	// Create also makes the node again that somebody removed.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	mustCreate(t, crypt(number))
	readFile(t, path, 512)
}

func TestGuestRemoveOfBusy(t *testing.T) {
	testenv.Guest(t)
	number, _ := loop(t, 2*mib)
	path := mustCreate(t, crypt(number))
	for _, v := range []struct {
		what  string
		flags int
		quick bool
	}{{"held exclusively, as by a mount", unix.O_RDONLY | unix.O_EXCL, true}, {"open", unix.O_RDONLY, false}} {
		fd, err := unix.Open(path, v.flags|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		err = Remove(t.Context(), mapName)
		if !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), "1 times") {
			t.Errorf("%s: %v", v.what, err)
		}
		if took := time.Since(start); v.quick && took >= closePatience {
			t.Errorf("%s: the answer took %v", v.what, took)
		}
		if info, err := Lookup(mapName); err != nil || info.OpenCount != 1 {
			t.Errorf("%s: lookup gives %+v, %v", v.what, info, err)
		}
		if err := unix.Close(fd); err != nil {
			t.Fatal(err)
		}
	}
	// A prober that lets go in time is waited for.
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(100*time.Millisecond, func() { _ = unix.Close(fd) })
	defer timer.Stop()
	if err := Remove(t.Context(), mapName); err != nil {
		t.Error(err)
	}
	if err := Remove(t.Context(), mapName); !errors.Is(err, ErrNotFound) || exit.Of(err) != exit.NoDevice {
		t.Errorf("the second removal: %v, want ErrNotFound", err)
	}
}

func TestGuestReadOnlyAndDiscard(t *testing.T) {
	testenv.Guest(t)
	number, _ := loop(t, 2*mib)
	for _, c := range []struct{ readOnly, discards bool }{{true, false}, {false, false}, {false, true}} {
		mapping := crypt(number)
		mapping.ReadOnly, mapping.Options.AllowDiscards = c.readOnly, c.discards
		path := mustCreate(t, mapping)
		info, err := Lookup(mapName)
		if err != nil || info.ReadOnly != c.readOnly {
			t.Errorf("%+v: lookup gives %+v, %v", c, info, err)
		}
		f, err := os.OpenFile(path, os.O_RDWR, 0) // the kernel allows this for a read-only device, and refuses the write
		if err == nil {
			_, err = f.Write(make([]byte, 4096))
			if err == nil {
				err = f.Sync()
			}
			if discarding := discard(int(f.Fd()), &[2]uint64{0, 4096}); (discarding == nil) != c.discards {
				t.Errorf("%+v: discard gives %v", c, discarding)
			}
			_ = f.Close()
		}
		if (err != nil) != c.readOnly {
			t.Errorf("%+v: a write gives %v", c, err)
		}
		if err := Remove(t.Context(), mapName); err != nil {
			t.Fatal(err)
		}
	}
}
