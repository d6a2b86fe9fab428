package vmtest

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"voldek/internal/testenv"
)

const unitsConfig = `[[volume]]
name = "luks2"
device = "/dev/vdb"
via = "kernel"
key = ["file:/etc/voldek/key"]
at_boot = true

[[volume]]
name = "luks2-4k"
device = "/srv/image"
via = "fuse"
key = ["file:/etc/voldek/key"]
at_boot = true
`

// lateVolume is a part of the configuration that is added while the daemon runs.
const lateVolume = `
[[volume]]
name = "luks1"
device = "/dev/vdc"
via = "kernel"
key = ["credential:volume-key"]
at_boot = true
`

// unitVolumes are the volumes of the system, in the order of their images; the last is a file.
func unitVolumes() []volume {
	kernel, late, fuse := volumes[0], volumes[2], volumes[1]
	kernel.disk, late.disk, fuse.disk = "/dev/vdb", "/dev/vdc", "/srv/image"
	return []volume{kernel, late, fuse}
}

const (
	kernelVolume = iota
	lateVolumeAt
	fuseVolume
)

const (
	fuseFile = "/run/voldek/fuse/luks2-4k/volume"
	dropIns  = "/etc/systemd/system/voldekd.service.d"
	// unitsFstab is how a host mounts a volume of the kernel backend: no word of voldekd, whose restart would unmount it.
	unitsFstab = "/dev/mapper/luks2 /data ext4 nofail,_netdev,x-systemd.device-timeout=0 0 0"
)

// property asks systemd about voldekd.service.
func property(t *testing.T, name string) string {
	t.Helper()
	return strings.TrimSpace(must(t, "systemctl", "show", "--value", "--property", name, "voldekd.service"))
}

// dropIn puts a file beside the unit.
func dropIn(t *testing.T, name, text string) {
	t.Helper()
	write(t, filepath.Join(dropIns, name), text, 0o644)
	must(t, "systemctl", "daemon-reload")
}

// listedOpen returns the open volumes by name; nil where voldek fails.
func listedOpen(t *testing.T) map[string]listed {
	t.Helper()
	out, rc := run(t, "voldek", "list", "--json")
	if rc != 0 {
		return nil
	}
	var answer struct{ Volumes []listed }
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		t.Fatalf("list --json: %v\n%s", err, out)
	}
	open := map[string]listed{}
	for _, v := range answer.Volumes {
		if v.State == "open" {
			open[v.Name] = v
		}
	}
	return open
}

// service waits until the daemon runs, as another process than before, with the volumes open, and returns its process.
func service(t *testing.T, before string, names ...string) (pid string) {
	t.Helper()
	eventually(t, "another daemon than "+before+" runs, with "+strings.Join(names, ", "), func() bool {
		pid = property(t, "MainPID")
		if property(t, "ActiveState") != "active" || pid == before {
			return false
		}
		open := listedOpen(t)
		for _, name := range names {
			if open[name].Export == "" {
				return false
			}
		}
		return true
	})
	return pid
}

func journal(t *testing.T, args ...string) string {
	t.Helper()
	return must(t, "journalctl", append([]string{"--boot", "--no-pager"}, args...)...)
}

// units is what the steps of TestUnits share.
type units struct {
	pid  string // of the daemon
	vols []volume
}

// intact reads both volumes from outside the service: the mounted one, and the FUSE export.
func (u *units) intact(t *testing.T) {
	t.Helper()
	wantContent(t, readFile(t, "/data/from-host"), &u.vols[kernelVolume], "from-host")
	wantContent(t, readExt4(t, fuseFile, "from-host"), &u.vols[fuseVolume], "from-host")
}

// again waits for the next daemon and for the volumes.
func (u *units) again(t *testing.T) {
	t.Helper()
	u.pid = service(t, u.pid, "luks2", "luks2-4k", "luks1")
	u.intact(t)
}

// TestUnits lives through what happens to a service, in one boot. Each step finds what the one before it left.
func TestUnits(t *testing.T) {
	testenv.Guest(t)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the journal:\n%s", journal(t))
		}
	})
	u := &units{pid: "0", vols: unitVolumes()}
	for _, step := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"boot", u.boot},
		{"process", u.process},
		{"devices", u.devices},
		{"analyze", u.analyze},
		{"restart", u.restart},
		{"reload", u.reload},
		{"socket activation", u.socketActivation},
		{"kill", u.kill},
		{"watchdog", u.watchdog},
		{"bad configuration", u.badConfiguration},
		{"stop with the FUSE volume in use", u.stopInUse},
		{"kernel only", u.kernelOnly},
		{"journal", u.journal},
	} {
		start := time.Now()
		passed := t.Run(step.name, step.run)
		t.Logf("%s: %v", step.name, time.Since(start).Round(time.Millisecond))
		if !passed {
			break
		}
	}
}

// The volumes listed in the configuration are open after the boot, and the host sees them.
func (u *units) boot(t *testing.T) {
	u.pid = service(t, u.pid, "luks2", "luks2-4k")
	eventually(t, "/data is mounted", func() bool { _, err := os.Stat("/data/from-host"); return err == nil })
	u.intact(t)
	checkTable(t, &u.vols[kernelVolume])
	checkStatus(t, &u.vols[kernelVolume])
	if text := journal(t); strings.Contains(text, "ordering cycle") || !strings.Contains(text, "Started voldekd.service") {
		t.Errorf("the boot did not go as it should:\n%s", text)
	}
	if failed := must(t, "systemctl", "list-units", "--failed", "--plain", "--no-legend"); failed != "" {
		t.Errorf("failed units: %s", failed)
	}
}

// process looks at the daemon from outside.
func (u *units) process(t *testing.T) {
	proc := func(name string) string { return string(readFile(t, filepath.Join("/proc", u.pid, name))) }
	for _, name := range []string{"environ", "cmdline"} {
		if strings.Contains(proc(name), volumeKey) {
			t.Errorf("the passphrase is in /proc/%s/%s", u.pid, name)
		}
	}
	wanted := map[string][]string{
		"limits": {`Max core file size +0 +0 `, `Max locked memory +unlimited +unlimited `},
		// VmLck: the key of the FUSE volume. CapBnd: DAC_OVERRIDE, DAC_READ_SEARCH, IPC_LOCK, SYS_ADMIN, MKNOD.
		"status": {`NoNewPrivs:\t1\n`, `Seccomp:\t2\n`, `VmLck:\t *[1-9]`, `CapBnd:\t0000000008204006\n`},
	}
	for name, wants := range wanted {
		for _, want := range wants {
			if text := proc(name); !regexp.MustCompile(want).MatchString(text) {
				t.Errorf("no %q in %s:\n%s", want, name, text)
			}
		}
	}
	if swap := property(t, "MemorySwapMax"); swap != "0" {
		t.Errorf("MemorySwapMax=%s", swap)
	}
	// With a mount namespace of its own, the FUSE volumes would be the daemon's alone.
	if ours := readlink(t, "/proc/1/ns/mnt"); ours != readlink(t, filepath.Join("/proc", u.pid, "ns/mnt")) {
		t.Error("the daemon has a mount namespace of its own")
	}
	u.notDumpable(t)
}

// notDumpable looks into the daemon as another process of root that lacks CAP_SYS_PTRACE. It may look into a dumpable
// process that has no more capabilities than itself.
func (u *units) notDumpable(t *testing.T) {
	t.Helper()
	without := []string{"--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace"}
	other := exec.Command("setpriv", append(without, "sleep", "infinity")...)
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Process.Kill(); _ = other.Wait() }()
	look := func(pid string) bool {
		return exec.Command("setpriv", append(without, "cat", "/proc/"+pid+"/environ")...).Run() == nil
	}
	eventually(t, "sleep can be looked into", func() bool { return look(strconv.Itoa(other.Process.Pid)) })
	if look(u.pid) {
		t.Error("the daemon is dumpable")
	}
}

func readlink(t *testing.T, path string) string {
	t.Helper()
	target, err := os.Readlink(path)
	if err != nil {
		t.Fatal(err)
	}
	return target
}

// devices opens some from within the service's control group.
func (u *units) devices(t *testing.T) {
	devices := map[string]bool{"/dev/vdc": true, "/dev/fuse": true, "/dev/kmsg": false, "/dev/ttyS0": false}
	for device, allowed := range devices {
		group := "/sys/fs/cgroup/system.slice/voldekd.service/cgroup.procs"
		out, rc := run(t, "sh", "-c", "echo $$ > "+group+" || exit 9; : < "+device)
		if rc == 9 || (rc == 0) != allowed {
			t.Errorf("%s: exit %d: %s", device, rc, out)
		}
	}
}

// analyze asks systemd-analyze. The bounds on the exposure leave room for other versions of systemd.
func (u *units) analyze(t *testing.T) {
	out := must(t, "systemd-analyze", "verify", "--man=no", "voldekd.service", "voldekd.socket")
	if strings.Contains(out, "voldekd") {
		t.Error(out)
	}
	checkExposure(t, 4.4) // 4.2 now
}

func checkExposure(t *testing.T, limit float64) {
	t.Helper()
	out := must(t, "systemd-analyze", "security", "--no-pager", "voldekd.service")
	match := regexp.MustCompile(`Overall exposure level for voldekd.service: ([0-9.]+)`).FindStringSubmatch(out)
	if match == nil {
		t.Fatalf("no figure: %s", out)
	}
	t.Logf("exposure %s", match[1])
	if exposure, err := strconv.ParseFloat(match[1], 64); err != nil || exposure > limit {
		t.Errorf("exposure %s, at most %v is accepted: %v\n%s", match[1], limit, err, out)
	}
}

// restart keeps the mounted volume. From here on, a system call that the unit forbids ends the daemon.
func (u *units) restart(t *testing.T) {
	dropIn(t, "test.conf", "[Service]\nLoadCredential=volume-key:/etc/voldek/key\nSystemCallErrorNumber=kill\n")
	must(t, "systemctl", "restart", "voldekd.service")
	u.pid = service(t, u.pid, "luks2", "luks2-4k")
	u.intact(t)
}

// reload brings a volume, with its key from a credential of systemd.
func (u *units) reload(t *testing.T) {
	write(t, "/etc/voldek/voldek.toml", unitsConfig+lateVolume, 0o600)
	must(t, "systemctl", "reload", "voldekd.service")
	if now := service(t, "", "luks2", "luks2-4k", "luks1"); now != u.pid {
		t.Errorf("process %s is %s now", u.pid, now)
	}
	dir, unmount := mount(t, "/dev/mapper/luks1", unix.MS_RDONLY)
	wantContent(t, readFile(t, filepath.Join(dir, "from-host")), &u.vols[lateVolumeAt], "from-host")
	unmount()
}

func (u *units) socketActivation(t *testing.T) {
	must(t, "systemctl", "stop", "voldekd.service")
	if state := property(t, "ActiveState"); state != "inactive" {
		t.Errorf("after stop: %s", state)
	}
	gone(t, fuseFile)
	must(t, "voldek", "list")
	u.again(t)
}

func (u *units) kill(t *testing.T) {
	must(t, "systemctl", "kill", "--kill-whom=main", "--signal=KILL", "voldekd.service")
	u.again(t)
}

func (u *units) watchdog(t *testing.T) {
	dropIn(t, "watchdog.conf", "[Service]\nWatchdogSec=5\n")
	must(t, "systemctl", "restart", "voldekd.service")
	u.again(t)
	must(t, "systemctl", "kill", "--kill-whom=main", "--signal=STOP", "voldekd.service")
	u.again(t)
	if n := property(t, "NRestarts"); n != "1" || !strings.Contains(journal(t), "Watchdog timeout") {
		t.Errorf("%s restarts", n)
	}
	if err := os.Remove(filepath.Join(dropIns, "watchdog.conf")); err != nil {
		t.Fatal(err)
	}
	must(t, "systemctl", "daemon-reload")
}

// A configuration that is wrong ends the service until somebody corrects it; what is mounted stays.
func (u *units) badConfiguration(t *testing.T) {
	config := string(readFile(t, "/etc/voldek/voldek.toml"))
	write(t, "/etc/voldek/voldek.toml", "nonsense = 1\n"+config, 0o600)
	if _, rc := run(t, "systemctl", "restart", "voldekd.service"); rc == 0 {
		t.Error("systemctl says that it started")
	}
	if status, state := property(t, "ExecMainStatus"), property(t, "ActiveState"); status != "64" || state != "failed" {
		t.Errorf("exit status %s, %s", status, state) // "activating": systemd tries again
	}
	if out, rc := run(t, "voldek", "list"); rc != 18 {
		t.Errorf("voldek list: exit %d, %s", rc, out)
	}
	wantContent(t, readFile(t, "/data/from-host"), &u.vols[kernelVolume], "from-host")
	write(t, "/etc/voldek/voldek.toml", config, 0o600)
	must(t, "systemctl", "restart", "voldekd.service")
	u.again(t)
}

// stopInUse: the daemon serves a FUSE volume until its last user has left.
func (u *units) stopInUse(t *testing.T) {
	f, err := os.Open(fuseFile)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	must(t, "systemctl", "stop", "--no-block", "voldekd.service")
	eventually(t, "the daemon stops", func() bool { return property(t, "SubState") == "stop-sigterm" })
	eventually(t, "it has said so", func() bool { return strings.Contains(journal(t, "_PID="+u.pid), "stopping") })
	if _, err := f.ReadAt(make([]byte, 4096), 1<<20); err != nil {
		t.Errorf("read while stopping: %v", err)
	}
	if state := property(t, "ActiveState"); state != "deactivating" {
		t.Errorf("the daemon did not wait for its user: %s", state)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	eventually(t, "the daemon is gone", func() bool { return property(t, "ActiveState") == "inactive" })
	if result := property(t, "Result"); result != "success" {
		t.Errorf("result %s", result)
	}
	gone(t, fuseFile)
	must(t, "systemctl", "start", "voldekd.service")
	u.again(t)
}

// kernelOnly applies the drop-in for hosts without FUSE volumes: disks and image files attach with it.
func (u *units) kernelOnly(t *testing.T) {
	must(t, "voldek", "detach", "luks2-4k")
	write(t, "/etc/voldek/voldek.toml", strings.SplitAfter(unitsConfig, "at_boot = true\n")[0], 0o600)
	example := string(readFile(t, "/usr/share/doc/voldek/kernel-only.conf"))
	dropIn(t, "kernel-only.conf", strings.Replace(example, "# ReadWritePaths=/srv/volumes", "ReadWritePaths=/srv", 1))
	must(t, "systemctl", "restart", "voldekd.service")
	u.pid = service(t, u.pid, "luks2")
	must(t, "umount", "/data")
	must(t, "voldek", "detach", "luks2")
	for _, v := range []volume{u.vols[kernelVolume], u.vols[fuseVolume]} {
		must(t, "voldek", "attach", v.disk, "--name", v.name, "--via", "kernel", "--key", "credential:volume-key")
		dir, unmount := mount(t, "/dev/mapper/"+v.name, 0)
		wantContent(t, readFile(t, filepath.Join(dir, "from-host")), &v, "from-host")
		unmount()
		must(t, "voldek", "detach", v.name)
	}
	checkExposure(t, 2.7) // 2.5 now
}

// journal: what was logged in all this tells no key and no complaint.
func (u *units) journal(t *testing.T) {
	text := journal(t, "--output=export")
	for _, bad := range []string{volumeKey, "locked memory", "status=31/SYS"} {
		if strings.Contains(text, bad) {
			t.Errorf("the journal says %q", bad)
		}
	}
	if !strings.Contains(text, "found again") {
		t.Error("this is not the journal")
	}
}
