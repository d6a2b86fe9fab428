// Package testenv gives tests the real things they run against: tools, root, FUSE, a cache for built fixtures, real
// servers and virtual machines. It is imported by tests only.
package testenv

import (
	"crypto/sha256"
	"encoding/hex"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// Long ends the test at once under -short (make check): it takes seconds, or needs servers, root or a VM.
func Long(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("left out of the short run")
	}
}

// Root skips unless the test runs as root.
func Root(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		Skip(t, "needs root")
	}
}

// FUSE skips unless /dev/fuse can be opened.
func FUSE(t testing.TB) {
	t.Helper()
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		Skip(t, "needs /dev/fuse")
	}
	_ = f.Close()
}

// Tool returns the path of a program, looking into the sbin directories too, and skips where it is not installed.
func Tool(t testing.TB, name string) string {
	t.Helper()
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path
		}
	}
	Skip(t, "needs "+name)
	return ""
}

// Skip skips the test for reason. Under CI=true a skip is a failure, unless doc/testing.md lists the reason.
func Skip(t testing.TB, reason string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		listed, err := os.ReadFile(filepath.Join(RepoRoot(), "doc", "testing.md"))
		if err != nil || !strings.Contains(string(listed), "- skip: "+reason+":") {
			t.Fatalf("would be skipped (%s), which doc/testing.md does not allow in CI", reason)
		}
	}
	t.Skip(reason)
}

// RepoRoot returns the directory of go.mod.
func RepoRoot() string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Dir(filepath.Dir(filepath.Dir(file)))
}

// Run runs a program to its end and returns its output, both streams together; a failure ends the test.
func Run(t testing.TB, name string, args ...string) string {
	t.Helper()
	return RunInput(t, nil, name, args...)
}

// RunInput is Run with bytes on standard input.
func RunInput(t testing.TB, input []byte, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stdin = strings.NewReader(string(input))
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// CacheDir returns a directory outside the repository in which things that are slow to build are kept between runs.
// The parts are everything the content depends on; another content gets another directory.
func CacheDir(t testing.TB, kind string, parts ...string) string {
	t.Helper()
	base, err := os.UserCacheDir()
	if err != nil {
		base = os.TempDir()
	}
	sum := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	dir := filepath.Join(base, "voldek", kind+"-"+hex.EncodeToString(sum[:8]))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}
