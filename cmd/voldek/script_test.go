package main

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"voldek/internal/testenv"
)

// The stories in testdata run the real binaries on volumes made by cryptsetup. Besides testscript's own commands:
//
//	exits CODE PROGRAM ARGS…   runs a program, which must end with that code; stdout and stderr can then be matched
//	daemon start|stop|kill     voldekd on $WORK/voldek.sock with $WORK/voldek.toml, as $DAEMON_PID; kill is SIGKILL, stop is SIGTERM
//	eventually PROGRAM ARGS…   repeats a program until it succeeds
//	damage FILE OFFSET COUNT   overwrites bytes of a file with 0xff
//	exposes COUNT FILE         how often the daemon's memory holds the bytes of a file
func TestStories(t *testing.T) { runStories(t, "testdata", func(*testscript.Env) error { return nil }) }

// The stories in testdata/barbican have a real Keystone and Barbican, as [service.mine] for the project that owns
// $UUID and as [service.theirs] for a user of another project; [service.away] is a closed port.
func TestBarbicanStories(t *testing.T) {
	testenv.Long(t)
	openstack := testenv.OpenStack(t)
	uuid, key := openstack.OrderKey(t, 256)
	gone, _ := openstack.OrderKey(t, 256)
	openstack.Delete(t, gone)
	runStories(t, "testdata/barbican", func(env *testscript.Env) error {
		env.Setenv("UUID", uuid)
		env.Setenv("GONE", gone)
		passphrase, password := filepath.Join(env.WorkDir, "passphrase"), filepath.Join(env.WorkDir, "password")
		service := func(name, url, user, project string) string {
			return fmt.Sprintf("[service.%s]\ntype = \"barbican\"\nauth_url = %q\nusername = %q\nproject_id = %q\npassword = \"file:%s\"\n"+
				"region = %q\nca_file = %q\n", name, url, user, project, password, openstack.Region, openstack.CAFile)
		}
		config := service("mine", openstack.AuthURL, openstack.Creator, openstack.ProjectID) + "default = true\n" +
			service("theirs", openstack.AuthURL, openstack.OtherUser, openstack.OtherProject) +
			service("away", "https://127.0.0.1:9/v3", openstack.Creator, openstack.ProjectID)
		return errors.Join(
			os.WriteFile(passphrase, []byte(hex.EncodeToString(key)), 0o600),
			os.WriteFile(password, []byte(openstack.Password), 0o600),
			appendFile(filepath.Join(env.WorkDir, "voldek.toml"), config))
	})
}

func appendFile(path, text string) error {
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

// runStories runs the scripts of a directory, each with a work directory, a configuration and a daemon of its own.
func runStories(t *testing.T, dir string, setup func(*testscript.Env) error) {
	testenv.Long(t)
	testenv.Root(t)
	testenv.FUSE(t)
	testenv.Tool(t, "cryptsetup")
	bin := t.TempDir()
	openToAll(t, bin)
	testenv.Run(t, "go", "build", "-C", testenv.RepoRoot(), "-o", bin+"/", "./cmd/...")
	testscript.Run(t, testscript.Params{
		Dir:                 dir,
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			openToAll(t, env.WorkDir)
			env.Setenv("PATH", bin+":/usr/sbin:/sbin:"+env.Getenv("PATH"))
			env.Setenv("VOLDEK_SOCKET", filepath.Join(env.WorkDir, "voldek.sock"))
			config := fmt.Sprintf("[daemon]\nrun_dir = %q\n", filepath.Join(env.WorkDir, "run"))
			if err := os.WriteFile(filepath.Join(env.WorkDir, "voldek.toml"), []byte(config), 0o600); err != nil {
				return err
			}
			d := &daemonProcess{env: env}
			env.Values[daemonKey{}] = d
			env.Defer(d.end)
			return setup(env)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits": exits, "daemon": daemonCommand, "eventually": eventually, "damage": damage, "exposes": exposes,
		},
	})
}

// openToAll lets other users reach a directory, for the stories of users without rights.
func openToAll(t *testing.T, dir string) {
	for dir := dir; dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

// exits runs a program through "exec", so that its output can be matched, and compares its exit code.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE PROGRAM ARGS…")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	var status *exec.ExitError
	if errors.As(err, &status) {
		got = status.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// patience bounds waits for conditions that always come true on a working machine, however slow.
const patience = 2 * time.Minute

func eventually(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 {
		ts.Fatalf("usage: eventually PROGRAM ARGS…")
	}
	program, err := lookPath(ts.Getenv("PATH"), args[0])
	ts.Check(err)
	for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		cmd := exec.Command(program, args[1:]...)
		cmd.Dir = ts.MkAbs(".")
		cmd.Env = append(os.Environ(), "PATH="+ts.Getenv("PATH"), "VOLDEK_SOCKET="+ts.Getenv("VOLDEK_SOCKET"))
		out, err := cmd.CombinedOutput()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("%v never succeeded: %v\n%s", args, err, out)
		}
	}
}

func damage(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: damage FILE OFFSET COUNT")
	}
	offset, err := strconv.ParseInt(args[1], 0, 64)
	ts.Check(err)
	count, err := strconv.Atoi(args[2])
	ts.Check(err)
	f, err := os.OpenFile(ts.MkAbs(args[0]), os.O_WRONLY, 0)
	ts.Check(err)
	_, err = f.WriteAt(bytes.Repeat([]byte{0xff}, count), offset)
	ts.Check(err)
	ts.Check(f.Close())
}

// exposes searches all memory of the daemon, as root can.
func exposes(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: exposes COUNT FILE")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	needle := []byte(ts.ReadFile(args[1]))
	pid := ts.Value(daemonKey{}).(*daemonProcess).cmd.Process.Pid
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	ts.Check(err)
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	ts.Check(err)
	defer mem.Close()
	found, searched := 0, 0
	for line := range strings.Lines(string(maps)) {
		var from, to int64
		var mode string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &mode); err != nil || mode[0] != 'r' {
			continue
		}
		part := make([]byte, to-from)
		n, _ := mem.ReadAt(part, from) // what the kernel keeps to itself cannot be read
		searched += n
		found += bytes.Count(part[:n], needle)
	}
	if found != want || searched < 1<<20 {
		ts.Fatalf("%d copies in %d bytes of memory, want %d", found, searched, want)
	}
}

// daemonKey finds the daemonProcess of a story.
type daemonKey struct{}

// daemonProcess is the voldekd of one story.
type daemonProcess struct {
	env *testscript.Env
	cmd *exec.Cmd
	log bytes.Buffer
}

func daemonCommand(ts *testscript.TestScript, neg bool, args []string) {
	d := ts.Value(daemonKey{}).(*daemonProcess)
	if neg || len(args) != 1 {
		ts.Fatalf("usage: daemon start|stop|kill")
	}
	switch args[0] {
	case "start":
		ts.Check(d.start())
		ts.Setenv("DAEMON_PID", strconv.Itoa(d.cmd.Process.Pid))
	case "stop":
		ts.Check(d.signal(syscall.SIGTERM))
	case "kill":
		ts.Check(d.signal(syscall.SIGKILL))
	default:
		ts.Fatalf("daemon %s?", args[0])
	}
}

func (d *daemonProcess) start() error {
	socket := d.env.Getenv("VOLDEK_SOCKET")
	program, err := lookPath(d.env.Getenv("PATH"), "voldekd")
	if err != nil {
		return err
	}
	d.cmd = exec.Command(program, "--config", filepath.Join(d.env.WorkDir, "voldek.toml"), "--socket", socket)
	d.cmd.Dir = d.env.WorkDir
	d.cmd.Stderr = &d.log
	d.log.Reset()
	if err := d.cmd.Start(); err != nil {
		return err
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			return conn.Close()
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the daemon does not listen: %w\n%s", err, d.log.String())
		}
	}
}

func (d *daemonProcess) signal(s syscall.Signal) error {
	if d.cmd == nil {
		return errors.New("the daemon is not running")
	}
	err := d.cmd.Process.Signal(s)
	_ = d.cmd.Wait()
	d.cmd = nil
	return err
}

// end stops the daemon and takes down what a killed one left.
func (d *daemonProcess) end() {
	if d.cmd != nil {
		_ = d.signal(syscall.SIGTERM)
	}
	d.env.T().Log("the daemon's log:\n" + d.log.String())
	mounts, _ := filepath.Glob(filepath.Join(d.env.WorkDir, "run", "fuse", "*"))
	for _, dir := range append(mounts, filepath.Join(d.env.WorkDir, "mnt")) {
		_ = syscall.Unmount(dir, syscall.MNT_DETACH)
	}
}

func lookPath(path, program string) (string, error) {
	for _, dir := range filepath.SplitList(path) {
		file := filepath.Join(dir, program)
		if info, err := os.Stat(file); err == nil && info.Mode().Perm()&0o111 != 0 {
			return file, nil
		}
	}
	return "", fmt.Errorf("%s: %w", program, fs.ErrNotExist)
}
