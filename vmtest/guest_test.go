package vmtest

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"voldek/internal/testenv"
)

// guest starts a daemon in the VM.
func guest(t *testing.T) *host {
	t.Helper()
	testenv.Guest(t)
	return start(t, "/bin")
}

func must(t *testing.T, program string, args ...string) string {
	t.Helper()
	return testenv.Run(t, program, args...)
}

// mount mounts an ext4 until the test ends or unmount is called.
func mount(t *testing.T, device string, flags uintptr) (dir string, unmount func()) {
	t.Helper()
	dir = t.TempDir()
	if err := unix.Mount(device, dir, "ext4", flags, ""); err != nil {
		t.Fatalf("mount %s: %v", device, err)
	}
	mounted := true
	unmount = func() {
		t.Helper()
		if !mounted {
			return
		}
		mounted = false
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", device, err)
		}
	}
	t.Cleanup(unmount)
	return dir, unmount
}

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func gone(t *testing.T, path string) {
	t.Helper()
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is still there: %v", path, err)
	}
}

var keyFlags = []string{"--key", "file:" + keyFile, "--via", "kernel"}

// Each volume opens, its ext4 mounts, what the host wrote is there and what we write stays; the key is nowhere to be seen
// and cryptsetup knows the mapping for its own kind.
func TestGuestMount(t *testing.T) {
	for i := range volumes {
		v := &volumes[i]
		t.Run(v.name, func(t *testing.T) {
			h := guest(t)
			export := h.attach(v.disk, v.name, keyFlags...)
			if want := "/dev/mapper/" + v.name; export != want {
				t.Errorf("the export is %s, want %s", export, want)
			}
			dir, unmount := mount(t, export, 0)
			wantContent(t, readFile(t, filepath.Join(dir, "from-host")), v, "from-host")
			if v.fuse {
				wantContent(t, readFile(t, filepath.Join(dir, "through-fuse")), v, "through-fuse")
			}
			if err := os.WriteFile(filepath.Join(dir, "from-guest"), content(v.name, "from-guest"), 0o600); err != nil {
				t.Fatal(err)
			}
			checkTable(t, v)
			checkStatus(t, v)
			h.exits(11, "detach", v.name) // it is mounted
			wantContent(t, readFile(t, filepath.Join(dir, "from-guest")), v, "from-guest")
			unmount()
			h.must("detach", v.name)
			gone(t, export)
			if open := h.list(); len(open) != 0 {
				t.Errorf("list shows %+v", open)
			}
			h.must("detach", v.name) // again, as after a lost answer
		})
	}
}

var hexKey = regexp.MustCompile(`\b[0-9a-f]{32,}\b`)

func checkTable(t *testing.T, v *volume) {
	t.Helper()
	table := must(t, "dmsetup", "table", "--showkeys", v.name)
	if key := fmt.Sprintf(" %s :%d:logon:", v.cipher, v.keyBits/8); !strings.Contains(table, key) || hexKey.MatchString(table) {
		t.Errorf("the table holds something else than %q: %s", key, table)
	}
	if size := fmt.Sprintf("sector_size:%d", v.sectorSize); strings.Contains(table, size) != (v.sectorSize != 512) {
		t.Errorf("sector size %d: %s", v.sectorSize, table)
	}
	if keys := readFile(t, "/proc/keys"); bytes.Contains(keys, []byte("logon")) && !unlinkedSoon(t) {
		t.Errorf("a key stays in the keyring:\n%s", keys)
	}
}

// unlinkedSoon waits for the kernel's collector, which takes unlinked keys in the background.
func unlinkedSoon(t *testing.T) bool {
	t.Helper()
	eventually(t, "the keyring is empty", func() bool { return !bytes.Contains(readFile(t, "/proc/keys"), []byte("logon")) })
	return true
}

func checkStatus(t *testing.T, v *volume) {
	t.Helper()
	status := must(t, "cryptsetup", "status", v.name)
	for _, want := range []string{"is active and is in use", "type: *" + v.kind, "cipher: *" + v.cipher,
		fmt.Sprintf("keysize: *%d bits", v.keyBits), "key location: *keyring", "device: *" + v.disk,
		fmt.Sprintf("sector size: *%d", v.sectorSize), "mode: *read/write"} {
		if !regexp.MustCompile(want).MatchString(status) {
			t.Errorf("cryptsetup status does not say %q:\n%s", want, status)
		}
	}
	uuid := must(t, "dmsetup", "info", "-c", "--noheadings", "-o", "uuid", v.name)
	if want := "^CRYPT-" + v.kind + "-[0-9a-f]{32}-" + regexp.QuoteMeta(v.name) + "\n$"; !regexp.MustCompile(want).MatchString(uuid) {
		t.Errorf("dm uuid %q, want %s", uuid, want)
	}
}

func TestGuestAttachAgain(t *testing.T) {
	h := guest(t)
	export := h.attach("/dev/vda", "one", keyFlags...)
	if again := h.attach("/dev/vda", "one", keyFlags...); again != export {
		t.Errorf("attached again as %s, first as %s", again, export)
	}
	h.exits(11, append([]string{"attach", "/dev/vda", "--name", "two"}, keyFlags...)...)
	h.exits(11, append([]string{"attach", "/dev/vdc", "--name", "one"}, keyFlags...)...)
	if names := must(t, "dmsetup", "ls"); strings.Count(names, "\n") != 1 || !strings.HasPrefix(names, "one\t") {
		t.Errorf("dmsetup ls:\n%s", names)
	}
}

func TestGuestWrongKey(t *testing.T) {
	h := guest(t)
	wrong := filepath.Join(t.TempDir(), "wrong")
	if err := os.WriteFile(wrong, []byte("another passphrase"), 0o600); err != nil {
		t.Fatal(err)
	}
	for i := range volumes {
		h.exits(12, "attach", volumes[i].disk, "--name", "x", "--key", "file:"+wrong, "--via", "kernel")
	}
	gone(t, "/dev/mapper/x")
	if names := must(t, "dmsetup", "ls"); !strings.Contains(names, "No devices") {
		t.Errorf("something is left: %s", names)
	}
	h.exits(0, append([]string{"attach", "/dev/vda", "--name", "x"}, keyFlags...)...) // the device was given back
}

// cryptsetup may take down what we opened: list tells the truth, and the volume attaches again.
func TestGuestClosedByCryptsetup(t *testing.T) {
	h := guest(t)
	export := h.attach("/dev/vdc", "data", keyFlags...)
	must(t, "cryptsetup", "close", "data")
	if open := h.list(); len(open) != 0 {
		t.Errorf("list shows %+v", open)
	}
	h.exits(10, "status", "data")
	h.must("detach", "data")
	h.attach("/dev/vdc", "data", keyFlags...)
	h.must("detach", "data")
	gone(t, export)
}

func TestGuestOpenedByCryptsetup(t *testing.T) {
	h := guest(t)
	must(t, "cryptsetup", "open", "--key-file", keyFile, "/dev/vda", "theirs")
	for _, name := range []string{"ours", "theirs"} {
		h.exits(11, append([]string{"attach", "/dev/vda", "--name", name}, keyFlags...)...)
	}
	must(t, "cryptsetup", "close", "theirs")
	h.attach("/dev/vda", "ours", keyFlags...)
}

// A killed daemon leaves the mapping in service; the next one finds it.
func TestGuestRestart(t *testing.T) {
	h := guest(t)
	v := &volumes[0]
	export := h.attach(v.disk, v.name, keyFlags...)
	dir, unmount := mount(t, export, unix.MS_RDONLY)
	for _, signal := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		h.stop(signal)
		wantContent(t, readFile(t, filepath.Join(dir, "from-host")), v, "from-host")
		h.run()
		open := h.list()
		if len(open) != 1 || open[0].Name != v.name || open[0].Export != export || open[0].Via != "kernel" || open[0].Device != v.disk {
			t.Fatalf("after %v: list shows %+v", signal, open)
		}
	}
	if again := h.attach(v.disk, v.name, keyFlags...); again != export {
		t.Errorf("attached again as %s", again)
	}
	h.exits(11, append([]string{"attach", v.disk, "--name", "other"}, keyFlags...)...)
	h.exits(11, "detach", v.name)
	unmount()
	h.must("detach", v.name)
	gone(t, export)
}

func TestGuestOptions(t *testing.T) {
	h := guest(t)
	export := h.attach("/dev/vda", "opts", append(keyFlags, "--allow-discards", "--perf-no_read_workqueue",
		"--perf-no_write_workqueue", "--perf-same_cpu_crypt", "--perf-submit_from_crypt_cpus", "--read-only")...)
	table := must(t, "dmsetup", "table", "opts")
	want := " 5 allow_discards same_cpu_crypt submit_from_crypt_cpus no_read_workqueue no_write_workqueue\n"
	if !strings.HasSuffix(table, want) {
		t.Errorf("table %q, want its end %q", table, want)
	}
	if status := must(t, "cryptsetup", "status", "opts"); !strings.Contains(status, "readonly") {
		t.Errorf("cryptsetup status does not say read-only:\n%s", status)
	}
	if open := h.list(); len(open) != 1 || !open[0].ReadOnly {
		t.Errorf("list shows %+v", open)
	}
	dir, unmount := mount(t, export, unix.MS_RDONLY)
	wantContent(t, readFile(t, filepath.Join(dir, "from-host")), &volumes[0], "from-host")
	unmount()
}

// A plain volume is the same to us and to cryptsetup, whichever hash makes the key. cryptsetup hashes what it reads from
// standard input, and takes a key file as it is.
func TestGuestPlain(t *testing.T) {
	h := guest(t)
	key := bytes.Repeat([]byte("raw key, 16 byte"), 4)
	file := filepath.Join(t.TempDir(), "plain-key")
	if err := os.WriteFile(file, key, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, hash := range []string{"ripemd160", "sha256", "plain"} {
		t.Run(hash, func(t *testing.T) {
			h.t = t
			ours := func(use func(device string)) {
				use(h.attach(plainDisk, "plain", "--type", "plain", "--cipher", "aes-xts-plain64", "--key-size", "512", "--hash", hash,
					"--key", "file:"+file, "--via", "kernel"))
				if status := must(t, "cryptsetup", "status", "plain"); !strings.Contains(status, "type:    PLAIN") {
					t.Errorf("cryptsetup status:\n%s", status)
				}
				h.must("detach", "plain")
			}
			theirs := func(use func(device string)) {
				args := []string{"open", "--type", "plain", "--cipher", "aes-xts-plain64", "--key-size", "512", plainDisk, "theirs"}
				if hash == "plain" {
					must(t, "cryptsetup", append(args, "--key-file", file)...)
				} else {
					testenv.RunInput(t, key, "cryptsetup", append(args, "--hash", hash)...)
				}
				use("/dev/mapper/theirs")
				must(t, "cryptsetup", "close", "theirs")
			}
			write := func(data []byte) func(string) {
				return func(device string) {
					if err := os.WriteFile(device, data, 0); err != nil {
						t.Fatal(err)
					}
				}
			}
			read := func(want []byte) func(string) {
				return func(device string) {
					got := head(t, device, len(want))
					if !bytes.Equal(got, want) {
						t.Errorf("%s holds other bytes", device)
					}
				}
			}
			first, second := content(hash, "ours")[:65536], content(hash, "theirs")[:65536]
			ours(write(first))
			theirs(read(first))
			theirs(write(second))
			ours(read(second))
		})
	}
	h.t = t
}

func head(t *testing.T, path string, n int) []byte {
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

// Both backends give the same bytes on the same machine, and FUSE serves a block device too.
func TestGuestBothBackends(t *testing.T) {
	h := guest(t)
	for i := range volumes {
		if v := &volumes[i]; v.fuse {
			var sums [][32]byte
			for _, via := range []string{"kernel", "fuse"} {
				export := h.attach(v.disk, v.name, "--key", "file:"+keyFile, "--via", via, "--read-only")
				sums = append(sums, sha256.Sum256(head(t, export, 4<<20)))
				h.must("detach", v.name)
			}
			if sums[0] != sums[1] {
				t.Errorf("%s: the backends differ", v.name)
			}
		}
	}
}

// An image file goes through a loop device, which is given back.
func TestGuestImageFile(t *testing.T) {
	h := guest(t)
	image := filepath.Join(t.TempDir(), "image")
	sparse(t, image, 4<<20)
	export := h.attach(image, "image", "--type", "plain", "--hash", "sha256", "--key", "file:"+keyFile, "--via", "kernel")
	if backing, err := filepath.Glob("/sys/block/loop*/loop/backing_file"); err != nil || len(backing) != 1 {
		t.Errorf("loop devices: %v, %v", backing, err)
	}
	h.exits(11, "attach", image, "--name", "again", "--type", "plain", "--hash", "sha256", "--key", "file:"+keyFile, "--via", "kernel")
	if err := os.WriteFile(export, content("image", "x")[:4096], 0); err != nil {
		t.Fatal(err)
	}
	h.must("detach", "image")
	eventually(t, "the loop device is free", func() bool {
		backing, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
		return err == nil && len(backing) == 0
	})
	if bytes.Equal(head(t, image, 4096), make([]byte, 4096)) {
		t.Error("nothing reached the file")
	}
}

// Where udev runs, its database and links know the volume when attach returns.
func TestUdev(t *testing.T) {
	h := guest(t)
	export := h.attach("/dev/vda", "linked", keyFlags...)
	target, err := os.Readlink(export)
	if err != nil || !strings.HasPrefix(target, "../dm-") {
		t.Errorf("%s leads to %q, %v", export, target, err)
	}
	properties := must(t, "udevadm", "info", "--query=property", "--name="+export)
	for _, want := range []string{"DM_NAME=linked\n", "DM_UUID=CRYPT-LUKS2-", "ID_FS_TYPE=ext4\n", "DM_UDEV_PRIMARY_SOURCE_FLAG=1\n"} {
		if !strings.Contains(properties, want) {
			t.Errorf("udev does not say %s:\n%s", want, properties)
		}
	}
	links, err := filepath.Glob("/dev/disk/by-id/dm-uuid-CRYPT-LUKS2-*-linked")
	if err != nil || len(links) != 1 {
		t.Errorf("links by id: %v, %v", links, err)
	}
	h.must("detach", "linked")
	gone(t, export)
	if out, err := exec.Command("udevadm", "settle").CombinedOutput(); err != nil {
		t.Errorf("udevadm settle: %v\n%s", err, out)
	}
	for _, link := range links {
		gone(t, link)
	}
}
