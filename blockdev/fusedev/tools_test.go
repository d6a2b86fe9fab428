package fusedev

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"voldek/internal/testenv"
)

// blank makes a sparse backing file.
func blank(t testing.TB, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "backing")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

func serveLong(t *testing.T, backing string, size int64, sectorSize int) *child {
	t.Helper()
	testenv.Long(t)
	testenv.FUSE(t)
	return serve(t, backing, testVolume(nil, size, sectorSize))
}

// fio writes random blocks, and reads and verifies each.
func TestFio(t *testing.T) {
	const size = 48 << 20
	for _, sectorSize := range []int{512, 4096} {
		c := serveLong(t, blank(t, size), size, sectorSize)
		for name, args := range map[string]string{
			"4k-libaio":       "--bs=4k --ioengine=libaio --iodepth=16 --direct=1",
			"4k-psync-fsync":  "--bs=4k --ioengine=psync --direct=0 --fsync=64 --size=8m",
			"mixed-psync":     "--bsrange=512-1m --ba=512 --ioengine=psync --direct=0",
			"mixed-direct":    fmt.Sprintf("--bsrange=%d-1m --ba=%d --ioengine=psync --direct=1", sectorSize, sectorSize),
			"mixed-libaio":    fmt.Sprintf("--bsrange=%d-1m --ba=%d --ioengine=libaio --iodepth=8 --direct=1", sectorSize, sectorSize),
			"unaligned-jobs":  "--bsrange=1000-70000 --bs_unaligned=1 --ioengine=psync --numjobs=4 --size=8m --offset_increment=11m",
			"mmap-read-write": "--bs=4k --ioengine=mmap --size=16m",
		} {
			t.Run(fmt.Sprintf("%d/%s", sectorSize, name), func(t *testing.T) {
				all := append([]string{"--name=v", "--filename=" + c.path(), "--rw=randwrite", "--verify=crc32c",
					"--verify_fatal=1", "--do_verify=1", "--verify_state_save=0", "--allow_file_create=0", "--size=48m"}, strings.Fields(args)...)
				testenv.Run(t, testenv.Tool(t, "fio"), all...)
			})
		}
		if err := c.close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}
}

// An ext4 file system lives on the export through a loop device, and on through a new export.
func TestExt4(t *testing.T) {
	testenv.Long(t)
	testenv.Root(t)
	const size = 64 << 20
	losetup, mkfs, e2fsck := testenv.Tool(t, "losetup"), testenv.Tool(t, "mkfs.ext4"), testenv.Tool(t, "e2fsck")
	backing := blank(t, size)
	files := map[string][]byte{"a": random(1, 5<<20), "dir/b": random(2, 100), "dir/c": random(3, 3<<20+1)}
	for round := range 2 {
		c := serveLong(t, backing, size, 4096)
		loop := strings.TrimSpace(testenv.Run(t, losetup, "--direct-io=on", "--find", "--show", c.path()))
		mnt := t.TempDir()
		release := func() {
			_ = unix.Unmount(mnt, unix.MNT_DETACH)
			_ = exec.Command(losetup, "-d", loop).Run()
		}
		t.Cleanup(release)
		if round == 0 {
			testenv.Run(t, mkfs, "-q", loop)
		} else {
			testenv.Run(t, e2fsck, "-fn", loop)
		}
		testenv.Run(t, "mount", loop, mnt)
		for name, content := range files {
			path := filepath.Join(mnt, name)
			if round == 0 {
				if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, content, 0o600); err != nil {
					t.Fatal(err)
				}
				continue
			}
			if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, content) {
				t.Errorf("%s differs (%v)", name, err)
			}
		}
		if err := c.close(); err == nil || !strings.Contains(err.Error(), "still in use") {
			t.Errorf("Close under a loop device: %v", err)
		}
		if err := unix.Unmount(mnt, 0); err != nil {
			t.Fatal(err)
		}
		testenv.Run(t, e2fsck, "-fn", loop)
		release()
		if err := c.close(); err != nil {
			t.Fatalf("close: %v", err)
		}
	}
}

// faultyDisk is a file whose reads, writes and flushes fail with an error of our choice while a trigger file exists. It is
// itself served by FUSE: nbdfuse in front of nbdkit, from size bytes of data in dir/data.
func faultyDisk(t *testing.T, size int64, plugin ...string) (path, dir string) {
	t.Helper()
	testenv.Long(t)
	testenv.FUSE(t)
	dir = t.TempDir()
	path = filepath.Join(dir, "disk")
	for _, f := range []string{path, dir + "/data"} {
		if err := os.WriteFile(f, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Truncate(dir+"/data", size); err != nil {
		t.Fatal(err)
	}
	args := []string{path, "[", testenv.Tool(t, "nbdkit")}
	for _, p := range plugin {
		args = append(args, strings.ReplaceAll(p, "DIR", dir))
	}
	cmd := exec.Command(testenv.Tool(t, "nbdfuse"), append(args, "]")...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = unix.Unmount(path, unix.MNT_DETACH)
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	})
	waitFor(t, func() bool {
		info, err := os.Stat(path)
		return err == nil && info.Size() == size
	})
	return path, dir
}

func touch(t *testing.T, path string) {
	t.Helper()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
}

// The error of the disk is the error of the reader or writer, and goes away with its cause.
func TestErrorsOfTheDisk(t *testing.T) {
	for name, want := range map[string]syscall.Errno{"EIO": syscall.EIO, "ENOSPC": syscall.ENOSPC} {
		t.Run(name, func(t *testing.T) {
			const size = 1 << 20
			disk, dir := faultyDisk(t, size, "--filter=error", "file", "DIR/data", "error="+name,
				"error-pread-rate=100%", "error-pread-file=DIR/no-reads",
				"error-pwrite-rate=100%", "error-pwrite-file=DIR/no-writes")
			c := serveLong(t, disk, size, 512)
			f, err := os.OpenFile(c.path(), os.O_RDWR|unix.O_DIRECT, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			page := alignedPage()[:]
			copy(page, random(1, 4096))
			if _, err := f.WriteAt(page, 8192); err != nil {
				t.Fatal(err)
			}
			touch(t, dir+"/no-writes")
			for _, n := range []int{4096, 100} { // as a whole, and by read-modify-write
				if _, err := unix.Pwrite(int(f.Fd()), page[:n], 8192); !errors.Is(err, want) {
					t.Errorf("write of %d bytes: %v, want %v", n, err, want)
				}
			}
			if _, err := f.ReadAt(page, 8192); err != nil || !bytes.Equal(page, random(1, 4096)) {
				t.Errorf("read while writes fail: %v, or other data", err)
			}
			touch(t, dir+"/no-reads")
			// Elsewhere, for the kernel has pages of the disk by now.
			if n, err := f.ReadAt(page, 768<<10); n != 0 || !errors.Is(err, want) {
				t.Errorf("read: %d, %v, want %v", n, err, want)
			}
			for _, file := range []string{"/no-reads", "/no-writes"} {
				if err := os.Remove(dir + file); err != nil {
					t.Fatal(err)
				}
			}
			copy(page, random(2, 4096))
			if _, err := f.WriteAt(page, 8192); err != nil {
				t.Errorf("write to the healed disk: %v", err)
			}
			if _, err := f.ReadAt(page, 8192); err != nil || !bytes.Equal(page, random(2, 4096)) {
				t.Errorf("read from the healed disk: %v, or other data", err)
			}
		})
	}
}

// A flush that failed is an error to everyone from then on, Close included.
func TestFailedFlushOfTheDisk(t *testing.T) {
	disk, dir := faultyDisk(t, 1<<20, "eval", "get_size=echo 1048576", "can_write=exit 0", "can_flush=exit 0",
		`pread=dd if=DIR/data iflag=skip_bytes,count_bytes skip=$4 count=$3 status=none`,
		`pwrite=dd of=DIR/data oflag=seek_bytes conv=notrunc seek=$4 status=none`,
		`flush=if [ -e DIR/no-flush ]; then echo EIO >&2; exit 1; fi`)
	c := serveLong(t, disk, 1<<20, 512)
	f, err := os.OpenFile(c.path(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("good"), 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatalf("fsync: %v", err)
	}
	touch(t, dir+"/no-flush")
	if _, err := f.WriteAt([]byte("lost?"), 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); !errors.Is(err, syscall.EIO) {
		t.Errorf("fsync of a failing disk: %v", err)
	}
	if err := os.Remove(dir + "/no-flush"); err != nil {
		t.Fatal(err)
	}
	for _, open := range []func() (*os.File, error){
		func() (*os.File, error) { return f, nil },
		func() (*os.File, error) { return os.OpenFile(c.path(), os.O_RDWR, 0) },
	} {
		g, err := open()
		if err != nil {
			t.Fatal(err)
		}
		if err := g.Sync(); !errors.Is(err, syscall.EIO) {
			t.Errorf("fsync after the failure: %v", err)
		}
		_ = g.Close()
	}
	if err := c.close(); err == nil || !strings.Contains(err.Error(), "flush "+disk) {
		t.Errorf("Close: %v", err)
	}
}

// A full file system under a sparse backing file is ENOSPC to the writer; what is there stays readable.
func TestFullFileSystem(t *testing.T) {
	testenv.Long(t)
	testenv.Root(t)
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=2m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	backing := filepath.Join(dir, "backing")
	touch(t, backing)
	if err := os.Truncate(backing, 8<<20); err != nil {
		t.Fatal(err)
	}
	c := serveLong(t, backing, 8<<20, 512)
	f, err := os.OpenFile(c.path(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := random(1, 64<<10)
	var full error
	var at int64
	for ; full == nil && at < 8<<20; at += int64(len(p)) {
		_, full = f.WriteAt(p, at)
	}
	if !errors.Is(full, syscall.ENOSPC) || at < 1<<20 {
		t.Errorf("at %d: %v", at, full)
	}
	got := make([]byte, len(p))
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, p) {
		t.Errorf("the beginning: %v, or other data", err)
	}
}

// A backing file that is cut off under the export is EIO to the reader, never zeros; the rest stays readable.
func TestTruncatedBacking(t *testing.T) {
	backing := tempFile(t, 1<<20)
	c := serveLong(t, backing.Name(), 1<<20, 4096)
	want := plaintext(t, testVolume(backing, 1<<20, 4096))
	if err := backing.Truncate(512<<10 + 100); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(c.path())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, x := range []struct{ off, n int64 }{{512 << 10, 1}, {512<<10 + 50, 4}, {0, 1 << 20}, {1<<20 - 1, 1}, {1000 << 10, 4096}} {
		if n, err := unix.Pread(int(f.Fd()), make([]byte, x.n), x.off); !errors.Is(err, syscall.EIO) {
			t.Errorf("read of %d bytes at %d: %d, %v", x.n, x.off, n, err)
		}
	}
	got := make([]byte, 512<<10)
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, want[:len(got)]) {
		t.Errorf("before the cut: %v, or other data", err)
	}
}

// A backing block device (here a loop device) is read, written and flushed like a file.
func TestBlockDeviceBacking(t *testing.T) {
	testenv.Long(t)
	testenv.Root(t)
	losetup := testenv.Tool(t, "losetup")
	file := tempFile(t, 1<<20)
	loop := strings.TrimSpace(testenv.Run(t, losetup, "--find", "--show", file.Name()))
	t.Cleanup(func() { _ = exec.Command(losetup, "-d", loop).Run() })
	v := testVolume(nil, 512<<10, 512)
	v.Offset, v.Discard = 4096, true
	testenv.FUSE(t)
	c := serve(t, loop, v)
	f, err := os.OpenFile(c.path(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	p := random(5, 100_001)
	if _, err := f.WriteAt(p, 12345); err != nil {
		t.Fatal(err)
	}
	if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 256<<10, 64<<10); err != nil {
		t.Errorf("discard: %v", err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	testenv.Run(t, losetup, "-d", loop)
	v.Backing = file
	if !bytes.Equal(plaintext(t, v)[12345:][:len(p)], p) {
		t.Error("what was written is not on the device")
	}
	raw := make([]byte, 64<<10)
	if _, err := file.ReadAt(raw, 4096+256<<10); err != nil || len(bytes.Trim(raw, "\x00")) > 0 {
		t.Errorf("the range was not discarded (%v)", err)
	}
}

// memory returns what the server has resident, in bytes.
func (c *child) memory() int {
	c.t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.cmd.Process.Pid))
	if err != nil {
		c.t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if f := strings.Fields(line); f[0] == "VmRSS:" {
			kib, err := strconv.Atoi(f[1])
			if err != nil {
				c.t.Fatal(err)
			}
			return kib << 10
		}
	}
	c.t.Fatal("no VmRSS")
	return 0
}

// A volume under the heaviest load takes at most 8 MiB more than one at rest.
func TestMemoryUnderLoad(t *testing.T) {
	const size = 256 << 20
	c := serveLong(t, blank(t, size), size, 512)
	rest := c.memory()
	for _, args := range []string{
		"--rw=randrw --bs=1m --ioengine=libaio --iodepth=32 --direct=1",
		"--rw=randrw --bs=4k --ioengine=libaio --iodepth=64 --direct=1",
		"--rw=randrw --bs=32k --ioengine=libaio --iodepth=64 --direct=1",
		"--rw=randrw --bsrange=512-1m --ba=512 --ioengine=psync --numjobs=16 --direct=1 --group_reporting",
	} {
		all := append([]string{"--name=m", "--filename=" + c.path(), "--allow_file_create=0", "--size=200m", "--runtime=2",
			"--time_based", "--norandommap"}, strings.Fields(args)...)
		testenv.Run(t, testenv.Tool(t, "fio"), all...)
		t.Logf("%s: %.1f MiB more than at rest", args, float64(c.memory()-rest)/(1<<20))
	}
	if more := c.memory() - rest; more > 8<<20 {
		t.Errorf("%d bytes more than at rest", more)
	}
}
