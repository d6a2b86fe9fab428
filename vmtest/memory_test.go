package vmtest

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A dm-crypt volume costs the daemon nothing but its name: the kernel has the key and does the work.
func TestGuestMemory(t *testing.T) {
	const volumes, allowance = 8, 8 * 256 // KiB; a FUSE volume takes about 5 MiB
	h := guest(t)
	dir := t.TempDir()
	image := filepath.Join(dir, "0.img")
	sparse(t, image, 2<<20)
	must(t, "cryptsetup", "luksFormat", "-q", "--type", "luks2", "--disable-locks", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000",
		"--luks2-metadata-size", "16k", "--luks2-keyslots-size", "512k", "--key-file", keyFile, image)
	header := readFile(t, image)
	idle := h.resident(t)
	h.attach(image, "m0", keyFlags...) // what the first attach of a process takes is not the volume's
	first := h.resident(t)
	for i := range volumes {
		image := filepath.Join(dir, fmt.Sprintf("%d.img", i+1))
		if err := os.WriteFile(image, header, 0o600); err != nil {
			t.Fatal(err)
		}
		h.attach(image, fmt.Sprintf("m%d", i+1), keyFlags...)
	}
	after := 0
	eventually(t, "the daemon has given back what attaching took", func() bool {
		after = h.resident(t)
		return after-first <= allowance
	})
	t.Logf("voldekd resident: idle %d KiB, with 1 dm volume %d KiB, with %d dm volumes %d KiB", idle, first, volumes+1, after)
}

// resident is the daemon's VmRSS in KiB.
func (h *host) resident(t *testing.T) (kib int) {
	t.Helper()
	status := string(readFile(t, fmt.Sprintf("/proc/%d/status", h.daemon.Process.Pid)))
	_, after, found := strings.Cut(status, "VmRSS:")
	if _, err := fmt.Sscan(after, &kib); !found || err != nil {
		t.Fatalf("no VmRSS: %v", err)
	}
	return kib
}
