package fusedev

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"voldek/internal/exit"
	"voldek/internal/testenv"
)

// mountHere serves v in this process; the export is gone when the test ends.
func mountHere(t *testing.T, v Volume) *Server {
	t.Helper()
	testenv.Long(t)
	testenv.FUSE(t)
	s, err := Mount(t.TempDir(), v)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if errors.Is(closeSoon(s), ErrBusy) {
			_ = s.Abort()
			<-s.Done()
		}
	})
	return s
}

func closeSoon(s *Server) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	return s.Close(ctx)
}

func isMounted(t testing.TB, dir string) bool {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Contains(string(mounts), " "+dir+" fuse.voldek ")
}

func ended(s *Server) bool {
	select {
	case <-s.Done():
		return true
	default:
		return false
	}
}

func TestMountLooksRight(t *testing.T) {
	v := testVolume(tempFile(t, 1<<20), 1<<20, 512)
	v.Name = "pg,data" // a comma must not become an option
	s := mountHere(t, v)
	dir := filepath.Dir(s.Path())

	var stat unix.Stat_t
	if err := unix.Stat(s.Path(), &stat); err != nil {
		t.Fatal(err)
	}
	if stat.Mode != unix.S_IFREG|0o600 || stat.Size != 1<<20 || stat.Blocks != 1<<11 || stat.Blksize != 4096 ||
		stat.Uid != uint32(os.Geteuid()) || stat.Nlink != 1 {
		t.Errorf("stat: %+v", stat)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 || entries[0].Name() != "volume" || entries[0].Type() != 0 {
		t.Errorf("directory: %v, %v", entries, err)
	}
	if info, err := os.Stat(dir); err != nil || info.Mode() != fs.ModeDir|0o500 {
		t.Errorf("mode of the directory: %v, %v", info.Mode(), err)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if !strings.Contains(line, " "+dir+" ") {
			continue
		}
		f := strings.Fields(line)
		if f[0] != "pg,data" || f[2] != "fuse.voldek" {
			t.Errorf("source %s, type %s", f[0], f[2])
		}
		for _, option := range []string{"nosuid", "nodev", "noexec", "default_permissions", "max_read=1048576"} {
			if !strings.Contains(","+f[3]+",", ","+option+",") {
				t.Errorf("options %s lack %s", f[3], option)
			}
		}
		if strings.Contains(f[3], "allow_other") {
			t.Error("others may look in")
		}
	}
	// Nothing else can be made or changed.
	for what, err := range map[string]error{
		"create": os.WriteFile(filepath.Join(dir, "other"), nil, 0o600),
		"mkdir":  os.Mkdir(filepath.Join(dir, "d"), 0o700),
		"remove": os.Remove(s.Path()),
		"rename": os.Rename(s.Path(), filepath.Join(dir, "x")),
		"link":   os.Link(s.Path(), filepath.Join(dir, "x")),
		"chmod":  os.Chmod(s.Path(), 0o666),
		"resize": os.Truncate(s.Path(), 512),
		"xattr":  unix.Setxattr(s.Path(), "user.x", []byte("y"), 0),
	} {
		if err == nil {
			t.Errorf("%s succeeded", what)
		}
	}
	if err := os.Truncate(s.Path(), 1<<20); err != nil {
		t.Errorf("truncate to the size it has: %v", err)
	}
	if err := os.Chtimes(s.Path(), time.Now(), time.Now()); err != nil {
		t.Errorf("touch: %v", err)
	}
}

func TestMountReadOnly(t *testing.T) {
	v := testVolume(tempFile(t, 1<<20), 1<<20, 512)
	v.ReadOnly = true
	s := mountHere(t, v)
	if info, err := os.Stat(s.Path()); err != nil || info.Mode() != 0o400 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if _, err := os.OpenFile(s.Path(), os.O_RDWR, 0); !errors.Is(err, syscall.EROFS) {
		t.Errorf("open for writing: %v", err)
	}
}

func TestMountRefuses(t *testing.T) {
	testenv.Long(t)
	testenv.FUSE(t)
	v := testVolume(tempFile(t, 1<<20), 1<<20, 512)
	full := t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "x"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Mount(full, v); !errors.Is(err, syscall.ENOTEMPTY) {
		t.Errorf("full directory: %v", err)
	}
	if _, err := Mount(filepath.Join(full, "none"), v); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
	bad := v
	bad.Key = bad.Key[:48]
	if _, err := Mount(t.TempDir(), bad); err == nil {
		t.Error("key of 48 bytes")
	}
	bad = v
	bad.Size = 100
	if _, err := Mount(t.TempDir(), bad); err == nil {
		t.Error("size of 100 bytes")
	}
}

func TestCloseWhileBusy(t *testing.T) {
	s := mountHere(t, testVolume(tempFile(t, 1<<20), 1<<20, 512))
	f, err := os.OpenFile(s.Path(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	err = closeSoon(s)
	if !errors.Is(err, ErrBusy) || exit.Of(err) != exit.Busy {
		t.Fatalf("Close with an open file: %v", err)
	}
	if want := s.Path() + ": still in use"; err.Error() != want {
		t.Errorf("message %q, want %q", err, want)
	}
	if ended(s) {
		t.Fatal("ended although it is in use")
	}
	p := random(9, 1000)
	if _, err := f.WriteAt(p, 77); err != nil {
		t.Errorf("write after a refused Close: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := closeSoon(s); err != nil {
		t.Fatalf("Close: %v", err)
	}
	if !ended(s) || isMounted(t, filepath.Dir(s.Path())) {
		t.Error("Close returned before the end")
	}
	if err := closeSoon(s); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if err := s.Abort(); err != nil {
		t.Errorf("Abort after Close: %v", err)
	}
}

func TestUnmountByHand(t *testing.T) {
	s := mountHere(t, testVolume(tempFile(t, 1<<20), 1<<20, 512))
	testenv.Root(t)
	if err := unix.Unmount(filepath.Dir(s.Path()), 0); err != nil {
		t.Fatal(err)
	}
	<-s.Done()
	if err := closeSoon(s); err != nil {
		t.Errorf("Close: %v", err)
	}
}

func TestAbortWhileBusy(t *testing.T) {
	v := testVolume(tempFile(t, 1<<20), 1<<20, 512)
	s := mountHere(t, v)
	f, err := os.OpenFile(s.Path(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Abort(); err != nil {
		t.Fatal(err)
	}
	if isMounted(t, filepath.Dir(s.Path())) {
		t.Error("still in the tree")
	}
	if ended(s) {
		t.Error("ended while a file is open")
	}
	p := random(9, 1000)
	if _, err := f.WriteAt(p, 77); err != nil {
		t.Errorf("write after Abort: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	<-s.Done()
	if !bytes.Equal(plaintext(t, v)[77:1077], p) {
		t.Error("what was written is not on the backing file")
	}
}

// A connection that is aborted from outside (/sys/fs/fuse/connections/N/abort) ends the export and leaves no dead mount.
func TestConnectionAborted(t *testing.T) {
	s := mountHere(t, testVolume(tempFile(t, 1<<20), 1<<20, 512))
	testenv.Root(t)
	control := t.TempDir()
	if err := unix.Mount("none", control, "fusectl", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Unmount(control, unix.MNT_DETACH) }()
	var stat unix.Stat_t
	if err := unix.Stat(s.Path(), &stat); err != nil {
		t.Fatal(err)
	}
	number := filepath.Join(control, strconv.Itoa(int(unix.Minor(stat.Dev))))
	if err := os.WriteFile(filepath.Join(number, "abort"), []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	<-s.Done()
	if isMounted(t, filepath.Dir(s.Path())) {
		t.Error("a dead mount is left")
	}
	if err := closeSoon(s); err != nil {
		t.Errorf("Close: %v", err)
	}
}

// After kill -9 the mount is dead; CleanStale takes it away, and leaves everything else alone.
func TestCleanStale(t *testing.T) {
	testenv.Long(t)
	testenv.FUSE(t)
	f := tempFile(t, 1<<20)
	c := serve(t, f.Name(), testVolume(nil, 1<<20, 512))
	open, err := os.Open(c.path())
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	if err := CleanStale(c.dir); err != nil || !isMounted(t, c.dir) {
		t.Fatalf("a living mount was cleaned away (%v)", err)
	}
	c.kill()
	if _, err := open.ReadAt(make([]byte, 10), 0); !errors.Is(err, syscall.ENOTCONN) {
		t.Errorf("read after kill -9: %v", err)
	}
	if _, err := os.Stat(c.path()); !errors.Is(err, syscall.ENOTCONN) {
		t.Errorf("stat after kill -9: %v", err)
	}
	for range 2 {
		if err := CleanStale(c.dir); err != nil {
			t.Fatal(err)
		}
		if isMounted(t, c.dir) {
			t.Fatal("the dead mount is still there")
		}
	}
	if err := CleanStale(c.dir + "/none"); err != nil {
		t.Error(err)
	}
}

// What was acknowledged with fsync before a kill -9 is on the backing file.
func TestKillKeepsWhatWasSynced(t *testing.T) {
	testenv.Long(t)
	testenv.FUSE(t)
	v := testVolume(tempFile(t, 1<<20), 1<<20, 4096)
	model := plaintext(t, v)
	for round := range 5 {
		backing := v.Backing
		v.Backing = nil
		c := serve(t, backing.Name(), v)
		v.Backing = backing
		w, err := os.OpenFile(c.path(), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		for i := range 20 {
			p, off := random(byte(round*20+i), 3000), int64(i*31000+round*7)
			if _, err := w.WriteAt(p, off); err != nil {
				t.Fatal(err)
			}
			copy(model[off:], p)
		}
		if err := w.Sync(); err != nil {
			t.Fatal(err)
		}
		c.kill()
		_ = w.Close()
		if err := CleanStale(c.dir); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(plaintext(t, v), model) {
			t.Fatalf("round %d: a synced write is lost", round)
		}
	}
}

// A reader that is killed while it waits does not disturb the export.
func TestKilledReaders(t *testing.T) {
	v := testVolume(tempFile(t, 8<<20), 8<<20, 512)
	s := mountHere(t, v)
	for range 20 {
		cmd := exec.Command(testenv.Tool(t, "dd"), "if="+s.Path(), "of=/dev/null", "bs=1M", "iflag=direct")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	got, err := os.ReadFile(s.Path())
	if err != nil || !bytes.Equal(got, plaintext(t, v)) {
		t.Errorf("after killed readers the volume differs (%v)", err)
	}
}

// Without the right to mount, fusermount3 mounts: what `voldek export` needs for an ordinary user.
func TestUnprivileged(t *testing.T) {
	testenv.Long(t)
	testenv.FUSE(t)
	testenv.Root(t)
	testenv.Tool(t, "fusermount3")
	if device, err := os.Stat("/dev/fuse"); err == nil && device.Mode().Perm() != 0o666 {
		// As udev makes it. Machines without udev have it for root alone.
		if err := os.Chmod("/dev/fuse", 0o666); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = os.Chmod("/dev/fuse", device.Mode().Perm()) }()
	}
	const nobody = 65534
	base := t.TempDir()
	// Both levels of testing's directory, for the user must reach what is inside.
	for _, dir := range []string{filepath.Dir(base), base} {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program, backing, dir := base+"/server", base+"/backing", base+"/mnt"
	testenv.Run(t, "cp", self, program)
	if err := os.WriteFile(backing, random(1, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{backing, dir} {
		if err := os.Chown(p, nobody, nobody); err != nil {
			t.Fatal(err)
		}
	}
	v := testVolume(nil, 1<<20, 512)
	v.Name = "a,b"
	user := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	c := serveIn(t, dir, backing, v, program, user)
	asNobody := func(script string) (string, error) {
		cmd := exec.Command("sh", "-c", script, "sh", c.path())
		cmd.SysProcAttr = user
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := asNobody(`echo hello | dd of="$1" conv=notrunc bs=7 seek=3 2>&1 && dd if="$1" bs=7 skip=3 count=1 2>/dev/null`); err != nil || !strings.Contains(out, "hello") {
		t.Fatalf("%v: %s", err, out)
	}
	if _, err := os.ReadFile(c.path()); !errors.Is(err, syscall.EACCES) {
		t.Errorf("root looked into a user's mount: %v", err)
	}
	holder := exec.Command("sh", "-c", `exec 3<"$1"; echo; read x`, "sh", c.path())
	holder.SysProcAttr = user
	in, _ := holder.StdinPipe()
	out, _ := holder.StdoutPipe()
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	_, _ = out.Read(make([]byte, 1))
	if err := c.close(); err == nil || !strings.Contains(err.Error(), "still in use") {
		t.Errorf("Close while in use: %v", err)
	}
	_ = in.Close()
	_ = holder.Wait()
	if err := c.close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	if isMounted(t, dir) {
		t.Error("still mounted")
	}
}

func TestAvailable(t *testing.T) {
	testenv.FUSE(t)
	if err := Available(); err != nil {
		t.Error(err)
	}
	if exit.Of(errNoHelper) != exit.NoBackend {
		t.Error("exit code")
	}
}
