package testenv

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// SystemdVM is a VM in which a Debian boots, with systemd as process 1. Its root is /dev/vda, so the test's disks begin
// with /dev/vdb; what the guest writes to the root is lost. Files of the VM go into the root, all with mode 0755.
type SystemdVM struct {
	VM
	Root    string // an image that Debian made
	Prepare string // for sh -e, in the root, before systemd starts: modes, systemctl enable
}

// The modules that the system must load by itself are taken out again: an initramfs that loads them hides a unit that
// keeps its service from using them.
const switchRoot = `set -e
mount -t ext4 /dev/vda /mnt
cp -a /root/. /mnt/
rmmod dm_crypt dm_mod loop fuse 2>/dev/null || true
for m in proc sys dev run; do mount -o move "/$m" "/mnt/$m"; done
SYSTEMD_OFFLINE=1 PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot /mnt sh -e /voldek-test/prepare
exec switch_root /mnt /lib/systemd/systemd
`

const testService = `[Unit]
Description=The tests of a guest
After=multi-user.target
[Service]
Type=oneshot
TimeoutStartSec=infinity
Environment=VOLDEK_GUEST=1
ExecStart=/bin/sh /voldek-test/run
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
[Install]
WantedBy=multi-user.target
`

// RunTests boots the system and runs in it, as a service, the tests of pkg (as "./vmtest") that match the -run pattern;
// then the system is shut down in the regular way. Each test of the guest is a subtest here; a test that is skipped there
// fails.
func (vm *SystemdVM) RunTests(t *testing.T, pattern, pkg string) {
	t.Helper()
	name, dir := filepath.Base(pkg), t.TempDir()
	build := exec.Command("go", "test", "-c", "-o", filepath.Join(dir, "tests"), pkg)
	build.Dir = RepoRoot()
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", build, err, out)
	}
	files := map[string]string{"/root/voldek-test": dir}
	for path, host := range vm.Files {
		files["/root"+path] = host
	}
	for file, text := range map[string]string{
		"prepare": "mv /voldek-test/*.service /etc/systemd/system/\nchmod 644 /etc/systemd/system/voldek-test.service\n" +
			"systemctl -q enable voldek-test.service\n" + vm.Prepare,
		"run": fmt.Sprintf("echo VOLDEK-TESTS %[1]s\n/voldek-test/tests -test.v -test.run '%[2]s'\n"+
			"echo VOLDEK-RESULT tests-%[1]s rc=$?\necho VOLDEK-RESULT end rc=0\nsystemctl --no-block poweroff\n", name, pattern),
		"voldek-test.service": testService,
	} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	machine := vm.VM
	machine.Files, machine.Script = files, switchRoot
	machine.Disks = append([]Disk{{Path: vm.Root}}, vm.Disks...)
	console := machine.Run(t)
	console.report(t, name)
	if t.Failed() || testing.Verbose() {
		t.Logf("console:\n%s", console.Text)
	}
}

// leanDpkg keeps out of the root what no test reads, and does not wait for the disk.
const leanDpkg = `force-unsafe-io
path-exclude=/usr/share/doc/*
path-exclude=/usr/share/info/*
path-exclude=/usr/share/locale/*
path-exclude=/usr/share/man/*
`

// Debian returns the image of a small Debian with systemd, the modules of kernel and the packages, of suite ("bookworm",
// "trixie") or of the suite that this host's apt is set up for where suite is empty. It is made once, in about a minute.
func Debian(t testing.TB, suite string, kernel KernelImage, packages ...string) string {
	t.Helper()
	Root(t)
	debootstrap, mke2fs := Tool(t, "debootstrap"), Tool(t, "mke2fs")
	packages = append([]string{"systemd", "systemd-sysv", "udev", "dbus", "kmod"}, packages...)
	mirror, hostSuite := debianMirror(t)
	if suite == "" {
		suite = hostSuite
	}
	include := strings.Join(packages, ",")
	dir := CacheDir(t, "debian", suite, mirror, include, kernel.Version, leanDpkg)
	return filepath.Join(once(t, filepath.Join(dir, "root"), func(dir string) {
		root := filepath.Join(dir, "root")
		put(t, filepath.Join(root, "etc/dpkg/dpkg.cfg.d/lean"), leanDpkg)
		// In a mount namespace: a debootstrap that is killed leaves /proc and /sys mounted in its root.
		Run(t, "unshare", "--mount", debootstrap, "--variant=minbase", "--include="+include, suite, root, mirror)
		Run(t, "rm", "-rf", filepath.Join(root, "var/cache/apt"), filepath.Join(root, "var/lib/apt/lists"))
		Run(t, "mkdir", "-p", filepath.Join(root, "usr/lib/modules"))
		Run(t, "cp", "-a", kernel.Modules, filepath.Join(root, "usr/lib/modules"))
		quiet(t, root)
		Run(t, mke2fs, "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-d", root, filepath.Join(dir, "root.img"), "1G")
		Run(t, "rm", "-rf", root)
	}), "root.img")
}

// quiet keeps the console for the tests, and the machine for itself.
func quiet(t testing.TB, root string) {
	t.Helper()
	put(t, filepath.Join(root, "etc/machine-id"), strings.Repeat("76", 16)+"\n") // no first boot, which applies presets
	put(t, filepath.Join(root, "etc/fstab"), "")
	put(t, filepath.Join(root, "etc/systemd/system.conf.d/quiet.conf"), "[Manager]\nShowStatus=no\n")
	for _, unit := range []string{"serial-getty@ttyS0.service", "getty@tty1.service", "apt-daily.timer",
		"apt-daily-upgrade.timer", "e2scrub_reap.service", "e2scrub_all.timer", "fstrim.timer", "dpkg-db-backup.timer"} {
		link(t, "/dev/null", filepath.Join(root, "etc/systemd/system", unit))
	}
}

func put(t testing.TB, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// debianMirror returns where the host's apt takes Debian from, and which one.
func debianMirror(t testing.TB) (address, suite string) {
	t.Helper()
	a := newApt(t, "")
	line := a.resolve(t, func() (string, error) {
		out, err := a.output("apt-get", "indextargets", "--format", "$(SITE) $(CODENAME)", "Label: Debian",
			"Created-By: Packages")
		if err == nil && out == "" {
			err = fmt.Errorf("apt has no Debian among its sources")
		}
		return out, err
	})
	line, _, _ = strings.Cut(line, "\n")
	address, suite, _ = strings.Cut(line, " ")
	return address, suite
}
