package testenv

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// KernelImage is a distribution's kernel, unpacked and not installed.
type KernelImage struct {
	Version string // as uname -r says
	Image   string // the file that QEMU boots
	Modules string // the directory with modules.dep
}

// Kernel returns Debian's kernel for virtual machines: of suite ("bookworm", "trixie"), or of the suite that this host's
// apt is set up for where suite is empty. It is downloaded once per version.
func Kernel(t testing.TB, suite string) KernelImage {
	t.Helper()
	depmod := Tool(t, "depmod")
	meta := "linux-image-cloud-amd64"
	a := newApt(t, suite)
	pkg := a.resolve(t, func() (string, error) { return a.dependency(meta, "linux-image-") })
	dir := a.unpacked(t, pkg)
	k := KernelImage{Version: strings.TrimPrefix(pkg, "linux-image-")}
	k.Image = filepath.Join(dir, "boot", "vmlinuz-"+k.Version)
	k.Modules = filepath.Join(dir, "lib", "modules", k.Version)
	if _, err := os.Stat(filepath.Join(dir, "usr", "lib", "modules", k.Version)); err == nil {
		k.Modules = filepath.Join(dir, "usr", "lib", "modules", k.Version) // since trixie
		link(t, "usr/lib", filepath.Join(dir, "lib"))                      // where depmod looks
	}
	once(t, filepath.Join(dir, "depmod"), func(string) { Run(t, depmod, "-b", dir, k.Version) })
	return k
}

// Unpacked returns a directory with the content of a Debian package of this host's suite, downloaded once per version and
// not installed.
func Unpacked(t testing.TB, pkg string) string {
	t.Helper()
	a := newApt(t, "")
	a.resolve(t, func() (string, error) { return a.version(pkg) })
	return a.unpacked(t, pkg)
}

// apt runs the host's apt, with lists of its own for a suite that the host does not use.
type apt struct {
	suite   string
	options []string
}

func newApt(t testing.TB, suite string) *apt {
	t.Helper()
	Tool(t, "apt-get")
	Tool(t, "dpkg-deb")
	a := &apt{suite: suite}
	if suite == "" {
		return a
	}
	site, err := a.output("apt-get", "indextargets", "--format", "$(SITE)", "Label: Debian", "Created-By: Packages")
	if err != nil {
		t.Fatal(err)
	}
	mirror, _, _ := strings.Cut(site, "\n")
	dir := CacheDir(t, "apt", suite, mirror)
	for _, sub := range []string{"lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	sources := "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] " + mirror + " " + suite + " main\n"
	if err := os.WriteFile(filepath.Join(dir, "sources.list"), []byte(sources), 0o644); err != nil {
		t.Fatal(err)
	}
	a.options = []string{
		"-oDir::Etc::SourceList=" + dir + "/sources.list", "-oDir::Etc::SourceParts=/dev/null",
		"-oDir::State::Lists=" + dir + "/lists", "-oDir::Cache=" + dir + "/cache",
	}
	return a
}

func (a *apt) output(program string, args ...string) (string, error) {
	cmd := exec.Command(program, append(a.options, args...)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w\n%s", program, strings.Join(args, " "), err, stderr.String())
	}
	return string(out), nil
}

// resolve asks apt's lists; where they know nothing, they are fetched first.
func (a *apt) resolve(t testing.TB, ask func() (string, error)) string {
	t.Helper()
	answer, err := ask()
	if err != nil {
		if _, err := a.output("apt-get", "-oDPkg::Lock::Timeout=600", "update"); err != nil {
			t.Fatal(err)
		}
		answer, err = ask()
	}
	if err != nil {
		t.Fatal(err)
	}
	return answer
}

// dependency returns the first package that pkg depends on and that begins with prefix.
func (a *apt) dependency(pkg, prefix string) (string, error) {
	out, err := a.output("apt-cache", "depends", pkg)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(out) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: "); ok && strings.HasPrefix(name, prefix) {
			return name, nil
		}
	}
	return "", fmt.Errorf("apt knows no dependency %s* of %s", prefix, pkg)
}

func (a *apt) version(pkg string) (string, error) {
	out, err := a.output("apt-cache", "show", "--no-all-versions", pkg)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(out) {
		if version, ok := strings.CutPrefix(line, "Version: "); ok {
			return strings.TrimSpace(version), nil
		}
	}
	return "", fmt.Errorf("apt knows no version of %s", pkg)
}

// unpacked returns the directory of pkg, keyed on its version, filled when first asked for.
func (a *apt) unpacked(t testing.TB, pkg string) string {
	t.Helper()
	version, err := a.version(pkg)
	if err != nil {
		t.Fatal(err)
	}
	return once(t, filepath.Join(CacheDir(t, "package", a.suite, pkg, version), "root"), func(dir string) {
		download := t.TempDir()
		cmd := exec.Command("apt-get", append(a.options, "download", pkg)...)
		cmd.Dir = download
		if out, err := cmd.CombinedOutput(); err != nil {
			// Lists older than the mirror name a version that is gone.
			t.Fatalf("%v: %v\n%s\nif the lists are old: apt-get update", cmd, err, out)
		}
		files, _ := filepath.Glob(filepath.Join(download, "*.deb"))
		if len(files) != 1 {
			t.Fatalf("apt-get download %s left %d packages", pkg, len(files))
		}
		Run(t, "dpkg-deb", "-x", files[0], dir)
	})
}

// once makes path, a directory, by fill: one test process at a time, and never half done under that name.
func once(t testing.TB, path string, fill func(dir string)) string {
	t.Helper()
	lock, err := os.OpenFile(path+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err == nil {
		return path
	}
	partial := path + ".partial"
	if err := errors.Join(os.RemoveAll(partial), os.Mkdir(partial, 0o755)); err != nil {
		t.Fatal(err)
	}
	fill(partial)
	if err := os.Rename(partial, path); err != nil {
		t.Fatal(err)
	}
	return path
}

func link(t testing.TB, target, path string) {
	t.Helper()
	if err := os.Symlink(target, path); err != nil && !errors.Is(err, fs.ErrExist) {
		t.Fatal(err)
	}
}
