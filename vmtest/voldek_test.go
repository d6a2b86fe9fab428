package vmtest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func itoa(n int) string { return strconv.Itoa(n) }

// host is a running voldekd and the voldek that talks to it, on the host or in the VM.
type host struct {
	t      *testing.T
	bin    string // directory of the programs
	dir    string // run directory and socket
	daemon *exec.Cmd
	log    bytes.Buffer
}

// start runs a daemon until the test ends; then nothing of it may be left open.
func start(t *testing.T, bin string) *host {
	t.Helper()
	h := &host{t: t, bin: bin, dir: t.TempDir()}
	config := fmt.Sprintf("[daemon]\nrun_dir = %q\n", filepath.Join(h.dir, "run"))
	if err := os.WriteFile(filepath.Join(h.dir, "voldek.toml"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	h.run()
	t.Cleanup(func() {
		for _, v := range h.list() {
			h.must("detach", v.Name)
		}
		h.stop(syscall.SIGTERM)
		if t.Failed() {
			t.Logf("voldekd said:\n%s", h.log.String())
		}
	})
	return h
}

func (h *host) socket() string { return filepath.Join(h.dir, "socket") }

// run starts the daemon and returns when it answers.
func (h *host) run() {
	h.t.Helper()
	h.daemon = exec.Command(filepath.Join(h.bin, "voldekd"), "--config", filepath.Join(h.dir, "voldek.toml"), "--socket", h.socket())
	h.daemon.Stderr = &h.log
	if err := h.daemon.Start(); err != nil {
		h.t.Fatal(err)
	}
	eventually(h.t, "voldekd answers", func() bool { _, rc := h.voldek("list"); return rc == 0 })
}

func (h *host) stop(signal syscall.Signal) {
	h.t.Helper()
	if err := h.daemon.Process.Signal(signal); err != nil {
		h.t.Fatal(err)
	}
	err := h.daemon.Wait()
	if signal == syscall.SIGTERM && err != nil {
		h.t.Errorf("voldekd ended with %v", err)
	}
}

// voldek runs one command and returns both its streams and its exit status.
func (h *host) voldek(args ...string) (out string, rc int) {
	h.t.Helper()
	return run(h.t, filepath.Join(h.bin, "voldek"), append([]string{"--socket", h.socket()}, args...)...)
}

// must runs a command that succeeds.
func (h *host) must(args ...string) string {
	h.t.Helper()
	return h.exits(0, args...)
}

// exits runs a command that ends with the exit status want.
func (h *host) exits(want int, args ...string) string {
	h.t.Helper()
	out, rc := h.voldek(args...)
	if rc != want {
		h.t.Fatalf("voldek %s: exit %d, want %d\n%s\nvoldekd said:\n%s", strings.Join(args, " "), rc, want, out, h.log.String())
	}
	return out
}

// listed is what list --json says of a volume.
type listed struct {
	Name, Device, Export, Via, State string
	Size                             int64
	Cipher                           string
	ReadOnly                         bool `json:"read_only"`
	SectorSize                       int  `json:"sector_size"`
}

// list returns the volumes that are open.
func (h *host) list() (open []listed) {
	h.t.Helper()
	out := h.must("list", "--json")
	var answer struct{ Volumes []listed }
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		h.t.Fatalf("list --json: %v\n%s", err, out)
	}
	for _, v := range answer.Volumes {
		if v.State == "open" {
			open = append(open, v)
		}
	}
	return open
}

// attach opens a volume and returns the path of its plaintext, which list names too.
func (h *host) attach(device, name string, args ...string) (export string) {
	h.t.Helper()
	out := h.must(append([]string{"attach", device, "--name", name}, args...)...)
	for _, v := range h.list() {
		if v.Name == name {
			if !strings.Contains(out, v.Export) {
				h.t.Errorf("attach did not print the export %s: %s", v.Export, out)
			}
			return v.Export
		}
	}
	h.t.Fatalf("%s is not in the list after: %s", name, out)
	return ""
}

func run(t *testing.T, program string, args ...string) (out string, rc int) {
	t.Helper()
	cmd := exec.Command(program, args...)
	data, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		t.Fatalf("%v: %v", cmd, err)
	}
	return string(data), cmd.ProcessState.ExitCode()
}

// eventually waits for a condition, which slow machines take long to reach.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatalf("a minute has passed without: %s", what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
