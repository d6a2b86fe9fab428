package testenv

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// VM is a small virtual machine: a real kernel, an initramfs of busybox and what the test puts in, and a serial console.
// QEMU emulates the processor, so no KVM is needed; a boot takes some 10 s.
type VM struct {
	Kernel   KernelImage
	Disks    []Disk            // /dev/vda, /dev/vdb, …
	Programs []string          // of the host, into /bin with their shared libraries
	Files    map[string]string // guest path: file or directory of the host
	Modules  []string          // besides those that every guest gets
	Udev     bool              // run systemd-udevd with the rules of device-mapper
	Script   string            // for sh, as root; use: check NAME COMMAND ARGUMENT…
	Memory   int               // MiB, 512 if zero
	Limit    time.Duration     // the VM is killed then; 5 minutes if zero
}

// Disk is a raw image. The guest's writes are lost unless Writable.
type Disk struct {
	Path     string
	Writable bool
}

// Console is what a VM left.
type Console struct {
	Text    string
	Results map[string]int // exit status of each check, by name
}

// guestModules are what a guest with disks and device-mapper needs, in Debian's kernels.
var guestModules = []string{"virtio_pci", "virtio_blk", "virtio_rng", "dm_mod", "dm_crypt", "xts", "essiv", "cbc",
	"aesni_intel", "sha256_generic", "sha512_generic", "rmd160", "loop", "fuse", "ext4", "af_alg", "algif_skcipher", "algif_hash"}

const guestInit = `#!/bin/sh
export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs run /run; mount -t tmpfs tmp /tmp
for m in $(cat /etc/modules); do insmod "/lib/modules/$m.ko" || echo "VOLDEK-RESULT insmod-$m rc=1"; done
ip link set lo up
if [ -e /bin/systemd-udevd ]; then
  systemd-udevd --daemon && udevadm trigger --action=add && udevadm settle || echo "VOLDEK-RESULT udev rc=1"
fi
check() { name=$1; shift; "$@"; echo "VOLDEK-RESULT $name rc=$?"; }
export VOLDEK_GUEST=1
. /script
sync; echo "VOLDEK-RESULT end rc=0"; poweroff -f
`

// Run boots the VM, waits until it is off and returns what it said. A VM that did not come to the end of its script fails
// the test, with its console; a check that failed does not.
func (vm *VM) Run(t testing.TB) Console {
	t.Helper()
	dir := t.TempDir()
	initrd := filepath.Join(dir, "initramfs")
	vm.writeInitramfs(t, initrd)
	if vm.Limit == 0 {
		vm.Limit = 5 * time.Minute
	}
	ctx, cancel := context.WithTimeout(context.Background(), vm.Limit)
	defer cancel()
	out, err := exec.CommandContext(ctx, Tool(t, "qemu-system-x86_64"), vm.arguments(initrd)...).CombinedOutput()
	console := parseConsole(out)
	if _, ended := console.Results["end"]; err != nil || !ended {
		t.Fatalf("the VM did not reach its end: %v (limit %v)\n%s", err, vm.Limit, console.Text)
	}
	for name, rc := range console.Results {
		if (name == "udev" || strings.HasPrefix(name, "insmod-")) && rc != 0 {
			t.Errorf("the VM's start: %s returned %d\n%s", name, rc, console.Text)
		}
	}
	return console
}

func (vm *VM) arguments(initrd string) []string {
	memory := vm.Memory
	if memory == 0 {
		memory = 512
	}
	args := []string{
		// Without cx16: QEMU 7.2 computes the flags after cmpxchg16b from stale state. The kernel's allocator uses it, and
		// now and then a garbage flag ends the guest in a double fault.
		"-accel", "tcg", "-cpu", "max,-cx16", "-m", strconv.Itoa(memory), "-smp", "1", "-nodefaults", "-no-user-config",
		"-display", "none", "-serial", "stdio", "-nic", "none", "-no-reboot", "-device", "virtio-rng-pci",
		"-kernel", vm.Kernel.Image, "-initrd", initrd,
		// The last four: emulation is slow and not faithful enough for the kernel's watchdogs and timer checks.
		"-append", "console=ttyS0 quiet panic=-1 mitigations=off nowatchdog no_timer_check rcupdate.rcu_cpu_stall_suppress=1",
	}
	for _, d := range vm.Disks {
		mode := "on"
		if d.Writable {
			mode = "off"
		}
		args = append(args, "-drive", fmt.Sprintf("file=%s,format=raw,if=virtio,snapshot=%s", d.Path, mode))
	}
	return args
}

func (vm *VM) writeInitramfs(t testing.TB, file string) {
	t.Helper()
	fs := newInitramfs(t)
	for _, dir := range []string{"bin", "dev", "etc", "lib/modules", "mnt", "proc", "run", "sys", "tmp", "var"} {
		fs.dir(dir)
	}
	for _, link := range []string{"sbin", "usr/bin", "usr/sbin"} {
		fs.link(link, "/bin")
	}
	fs.link("var/run", "/run")
	busybox := Tool(t, "busybox")
	fs.copy("bin/busybox", busybox)
	for _, applet := range strings.Fields(Run(t, busybox, "--list")) {
		if applet != "busybox" {
			fs.link("bin/"+applet, "busybox")
		}
	}
	for _, program := range vm.Programs {
		fs.program(program)
	}
	if vm.Udev {
		addUdev(t, fs)
	}
	for name, host := range vm.Files {
		fs.copy(name, host)
	}
	order := fs.modules(vm.Kernel, append(guestModules, vm.Modules...))
	fs.file("etc/modules", []byte(strings.Join(order, "\n")+"\n"))
	fs.file("etc/passwd", []byte("root:x:0:0:root:/:/bin/sh\n"))
	fs.file("etc/group", []byte("root:x:0:\n"))
	fs.file("script", []byte(vm.Script))
	fs.file("init", []byte(guestInit))
	fs.write(file)
}

// addUdev puts systemd-udevd of the distribution and the rules that concern block devices into the guest.
func addUdev(t testing.TB, fs *initramfs) {
	t.Helper()
	root := Unpacked(t, "udev")
	for _, path := range []string{"bin/udevadm", "usr/bin/udevadm"} {
		if host := filepath.Join(root, path); fileExists(host) {
			fs.program(host)
		}
	}
	fs.link("bin/systemd-udevd", "udevadm")
	fs.program(Tool(t, "dmsetup"))
	for _, rule := range []string{"50-udev-default", "55-dm", "60-block", "60-persistent-storage",
		"60-persistent-storage-dm", "95-dm-notify"} {
		found := false
		for _, dir := range []string{"/", root} {
			for _, lib := range []string{"usr/lib", "lib"} {
				if host := filepath.Join(dir, lib, "udev/rules.d", rule+".rules"); !found && fileExists(host) {
					fs.copy("usr/lib/udev/rules.d/"+rule+".rules", host)
					found = true
				}
			}
		}
		if !found {
			t.Fatalf("udev rule %s is not installed (package dmsetup)", rule)
		}
	}
}

func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

var resultLine = regexp.MustCompile(`VOLDEK-RESULT (\S+) rc=([0-9]+)`)

func parseConsole(out []byte) Console {
	c := Console{Text: strings.ReplaceAll(string(out), "\r", ""), Results: map[string]int{}}
	for _, match := range resultLine.FindAllStringSubmatch(c.Text, -1) {
		c.Results[match[1]], _ = strconv.Atoi(match[2])
	}
	return c
}

// Guest skips unless the test runs inside a VM that RunTests booted: as root, with device-mapper.
func Guest(t testing.TB) {
	t.Helper()
	Long(t)
	if os.Getenv("VOLDEK_GUEST") == "" {
		Skip(t, "needs device-mapper")
	}
}

var testLine = regexp.MustCompile(`--- (PASS|FAIL|SKIP): (\S+) \(`)

// RunTests boots the VM and runs in it the tests of the packages (as "./blockdev/dm") that match the -run pattern. Each
// test of the guest is a subtest here; a test that is skipped there fails.
func (vm *VM) RunTests(t *testing.T, pattern string, packages ...string) {
	t.Helper()
	if vm.Files == nil {
		vm.Files = map[string]string{}
	}
	dir := t.TempDir()
	for _, pkg := range packages {
		name := filepath.Base(pkg)
		binary := filepath.Join(dir, name)
		build := exec.Command("go", "test", "-c", "-o", binary, pkg)
		build.Dir = RepoRoot()
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", build, err, out)
		}
		vm.Files["/tests/"+name] = binary
		vm.Script += fmt.Sprintf("echo VOLDEK-TESTS %[1]s; check tests-%[1]s /tests/%[1]s -test.v -test.run '%s'\n", name, pattern)
	}
	console := vm.Run(t)
	for _, pkg := range packages {
		name := filepath.Base(pkg)
		t.Run(name, func(t *testing.T) { console.report(t, name) })
	}
	if t.Failed() || testing.Verbose() {
		t.Logf("console:\n%s", console.Text)
	}
}

// report turns the outcomes of one test binary into subtests.
func (c *Console) report(t *testing.T, name string) {
	_, text, _ := strings.Cut(c.Text, "VOLDEK-TESTS "+name+"\n")
	text, _, found := strings.Cut(text, "VOLDEK-RESULT tests-"+name+" ")
	if !found || c.Results["tests-"+name] != 0 {
		t.Errorf("the tests ended with status %d", c.Results["tests-"+name])
	}
	outcomes := testLine.FindAllStringSubmatch(text, -1)
	if len(outcomes) == 0 {
		t.Error("no test was run")
	}
	for _, outcome := range outcomes {
		t.Run(outcome[2], func(t *testing.T) {
			if outcome[1] != "PASS" {
				t.Errorf("%s in the guest", outcome[1])
			}
		})
	}
}
