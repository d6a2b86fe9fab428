package xts

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"voldek/internal/testenv"
)

// The tests of this package, built for arm64 and run by QEMU where the processor is another.
func TestARM64(t *testing.T) {
	if runtime.GOARCH == "arm64" {
		return
	}
	testenv.Long(t)
	qemu := testenv.Tool(t, "qemu-aarch64-static")
	binary := filepath.Join(t.TempDir(), "xts.test")
	build := exec.Command("go", "test", "-c", "-o", binary, ".")
	build.Env = append(os.Environ(), "GOARCH=arm64", "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	const tests = "^(TestVectors|TestDifferential.*|TestSplit|TestLongRequest|TestUnaligned|TestGuardPages|TestMisuse|FuzzXTS)$"
	out, err := exec.Command(qemu, binary, "-test.short", "-test.v", "-test.run", tests).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if !strings.Contains(string(out), "--- PASS: TestDifferential/arm64-aes") {
		t.Errorf("the tier for arm64 was not tested:\n%s", out)
	}
}
