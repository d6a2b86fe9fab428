//go:build amd64 && !purego

package xts

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"testing"
	"unsafe"

	"voldek/internal/testenv"
)

// What the kernel says of the processor must not be missed: the tier would go untested, and unused.
func TestTiers(t *testing.T) {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		t.Fatal(err)
	}
	flags := bytes.Fields(regexp.MustCompile(`(?m)^flags\s*:(.*)$`).FindSubmatch(info)[1])
	has := func(names ...string) bool {
		return !slices.ContainsFunc(names, func(name string) bool {
			return !slices.ContainsFunc(flags, func(f []byte) bool { return string(f) == name })
		})
	}
	want := []tier{generic}
	if has("aes", "pclmulqdq") {
		want = slices.Insert(want, 0, aesNI)
	}
	if has("aes", "pclmulqdq", "avx2", "vaes", "vpclmulqdq") {
		want = slices.Insert(want, 0, avx2VAES)
	}
	if has("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vbmi2", "vaes", "vpclmulqdq") {
		want = slices.Insert(want, 0, avx512VAES)
	}
	if !slices.Equal(tiers, want) {
		t.Errorf("tiers are %v, for this processor they should be %v", tiers, want)
	}
	c := newCipher(t, random(15, 64))
	if c.Implementation() != want[0].String() {
		t.Errorf("New chose %s", c.Implementation())
	}
}

// The generator and the assembly rely on this layout.
func TestLayout(t *testing.T) {
	var k asmKeys
	for name, v := range map[string][2]uintptr{
		"whiten":  {unsafe.Offsetof(k.encrypt.whiten), 15 * 64},
		"jumps":   {unsafe.Offsetof(k.encrypt.jumps), 16 * 64},
		"decrypt": {unsafe.Offsetof(k.decrypt), 21 * 64},
		"tweak":   {unsafe.Offsetof(k.tweak), 2 * 21 * 64},
		"right":   {unsafe.Offsetof(shared.right), 2 * 64},
		"pack":    {unsafe.Offsetof(shared.pack), 4 * 64},
		"unpack":  {unsafe.Offsetof(shared.unpack), 5 * 64},
	} {
		if v[0] != v[1] {
			t.Errorf("%s is at %d, not %d", name, v[0], v[1])
		}
	}
	if unsafe.Sizeof(k) > 4096 {
		t.Errorf("keys need %d bytes, more than the smallest page", unsafe.Sizeof(k))
	}
}

// The assembly is what the generator writes.
func TestGenerated(t *testing.T) {
	testenv.Long(t)
	dir := t.TempDir()
	cmd := exec.Command("go", "run", ".", "-out", dir)
	cmd.Dir = "_asm"
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, pattern := range []string{"*.s", "limit/*.s"} {
		files, _ := filepath.Glob(pattern)
		if len(files) == 0 {
			t.Fatalf("no %s", pattern)
		}
		for _, name := range files {
			here, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			if made, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(here, made) {
				t.Errorf("%s is not what go generate makes (%v)", name, err)
			}
		}
	}
}
