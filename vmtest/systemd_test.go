package vmtest

import (
	"cmp"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"voldek/internal/testenv"
)

// The packaged units do their work under a real systemd: a Debian boots with them, and TestUnits is run in it.
func TestSystemd(t *testing.T) {
	testenv.Long(t)
	testenv.Root(t)
	dir := t.TempDir()
	bin := buildPrograms(t)
	key, config := filepath.Join(dir, "key"), filepath.Join(dir, "voldek.toml")
	write(t, key, volumeKey, 0o600)
	write(t, config, unitsConfig, 0o600)
	var images []string
	for _, v := range unitVolumes() {
		images = append(images, filepath.Join(dir, v.name+".img"))
		v.make(t, key, images[len(images)-1])
	}
	units := filepath.Join(testenv.RepoRoot(), "systemd")
	vm := testenv.SystemdVM{VM: testenv.VM{Memory: 1024, Limit: 6 * time.Minute,
		Disks: []testenv.Disk{{Path: images[0]}, {Path: images[1]}},
		Files: map[string]string{
			"/usr/bin/voldek":                         filepath.Join(bin, "voldek"),
			"/usr/sbin/voldekd":                       filepath.Join(bin, "voldekd"),
			"/usr/lib/systemd/system/voldekd.service": filepath.Join(units, "voldekd.service"),
			"/usr/lib/systemd/system/voldekd.socket":  filepath.Join(units, "voldekd.socket"),
			"/usr/share/doc/voldek/kernel-only.conf":  filepath.Join(units, "voldekd.service.d", "kernel-only.conf.example"),
			"/etc/voldek/voldek.toml":                 config,
			"/etc/voldek/key":                         key,
			unitVolumes()[fuseVolume].disk:            images[fuseVolume],
		}},
		Prepare: `chmod 644 /usr/lib/systemd/system/voldekd.* /usr/share/doc/voldek/kernel-only.conf
chmod 600 /etc/voldek/* /srv/*
mkdir /data
echo '` + unitsFstab + `' >> /etc/fstab
systemctl -q enable voldekd.service
`}
	for _, suite := range []string{"", "trixie"} { // this host's Debian, and systemd 257
		t.Run(cmp.Or(suite, "host"), func(t *testing.T) {
			vm.Kernel = testenv.Kernel(t, suite)
			vm.Root = testenv.Debian(t, suite, vm.Kernel, "dmsetup", "cryptsetup-bin", "e2fsprogs")
			vm.RunTests(t, "^TestUnits$", "./vmtest")
		})
	}
}

// What systemd-analyze finds wrong with the units needs no VM. Their programs and manual pages are not installed here.
func TestUnitFiles(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("without systemd-analyze: TestSystemd asks it in the VM")
	}
	dir := t.TempDir()
	args := []string{"verify", "--man=no"}
	for _, unit := range []string{"voldekd.service", "voldekd.socket"} {
		text := string(readFile(t, filepath.Join(testenv.RepoRoot(), "systemd", unit)))
		text = strings.ReplaceAll(text, "/usr/sbin/voldekd", "/bin/true")
		args = append(args, filepath.Join(dir, unit))
		write(t, filepath.Join(dir, unit), text, 0o644)
	}
	out := testenv.Run(t, analyze, args...)
	if strings.Contains(out, "voldekd") {
		t.Error(out)
	}
}

func write(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}
