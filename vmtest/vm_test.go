package vmtest

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"voldek/internal/testenv"
)

// A volume opened through dm-crypt and through FUSE is the same volume. The VM has the kernel of this host's Debian and no
// udev; a second one has the next Debian's kernel, and udev.
func TestKernelBackend(t *testing.T) {
	testenv.Long(t)
	testenv.FUSE(t)
	kernel := testenv.Kernel(t, "")
	dir := t.TempDir()
	bin := buildPrograms(t)
	key := filepath.Join(dir, "key")
	if err := os.WriteFile(key, []byte(volumeKey), 0o600); err != nil {
		t.Fatal(err)
	}
	var disks []testenv.Disk
	for i := range volumes {
		image := filepath.Join(dir, volumes[i].name+".img")
		volumes[i].make(t, key, image)
		disks = append(disks, testenv.Disk{Path: image, Writable: true})
	}
	plain := filepath.Join(dir, "plain.img")
	sparse(t, plain, 8<<20)
	disks = append(disks, testenv.Disk{Path: plain, Writable: true})

	t.Run("host writes through FUSE", func(t *testing.T) {
		h := start(t, bin)
		for i := range volumes {
			if v := &volumes[i]; v.fuse {
				writeExt4(t, h.attach(disks[i].Path, v.name, "--key", "file:"+key, "--via", "fuse"), "through-fuse",
					content(v.name, "through-fuse"))
			}
		}
	})

	guest := func(k testenv.KernelImage, udev bool) testenv.VM {
		vm := testenv.VM{Kernel: k, Udev: udev, Disks: disks, Limit: 10 * time.Minute, Memory: 768,
			Programs: []string{filepath.Join(bin, "voldek"), filepath.Join(bin, "voldekd")},
			Files:    map[string]string{keyFile: key}}
		for _, tool := range []string{"cryptsetup", "dmsetup"} {
			vm.Programs = append(vm.Programs, testenv.Tool(t, tool))
		}
		return vm
	}
	t.Run("VM", func(t *testing.T) {
		vm := guest(kernel, false)
		vm.RunTests(t, "^TestGuest", "./blockdev/dm", "./vmtest")
	})

	t.Run("host reads what dm-crypt wrote", func(t *testing.T) {
		h := start(t, bin)
		for i := range volumes {
			v := &volumes[i]
			export := filepath.Join(t.TempDir(), "plain")
			if v.fuse {
				export = h.attach(disks[i].Path, v.name, "--key", "file:"+key, "--via", "fuse")
			} else {
				decryptLUKS1(t, key, disks[i].Path, export)
			}
			wantContent(t, readExt4(t, export, "from-guest"), v, "from-guest")
			wantContent(t, readExt4(t, export, "from-host"), v, "from-host")
		}
	})

	t.Run("VM with udev", func(t *testing.T) {
		for i := range disks {
			disks[i].Writable = false
		}
		vm := guest(testenv.Kernel(t, "trixie"), true)
		vm.RunTests(t, "^Test(Udev|Guest(Mount|Restart|Closed|Table|Every|Concurrent|Remove|Leftover))", "./blockdev/dm", "./vmtest")
	})
}

// buildPrograms returns a directory with voldek and voldekd, static, as they are shipped.
func buildPrograms(t *testing.T) (bin string) {
	t.Helper()
	bin = t.TempDir()
	build := exec.Command("go", "build", "-o", bin+"/", "./cmd/voldek", "./cmd/voldekd")
	build.Dir = testenv.RepoRoot()
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", build, err, out)
	}
	return bin
}
