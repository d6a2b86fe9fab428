package fusedev

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// serveEnv makes the test binary a server of one export, in a process of its own: a process that maps a file which it serves
// itself can wait for itself, since the Go runtime takes a page fault for work and not for a system call.
const serveEnv = "FUSEDEV_TEST_SERVE"

func TestMain(m *testing.M) {
	if os.Getenv(serveEnv) != "" {
		if err := serveMain(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// order is what the server gets as JSON on the first line of its standard input.
type order struct {
	Dir, Backing string
	BackingFlags int
	Volume       Volume
}

// serveMain mounts, says so, and closes the export at each further line of its input: it answers with a line of "" or the
// error, and ends when the export has.
func serveMain() error {
	in := bufio.NewReader(os.Stdin)
	var o order
	line, err := in.ReadBytes('\n')
	if err != nil {
		return err
	}
	if err := json.Unmarshal(line, &o); err != nil {
		return err
	}
	if o.Volume.Backing, err = os.OpenFile(o.Backing, o.BackingFlags, 0); err != nil {
		return err
	}
	s, err := Mount(o.Dir, o.Volume)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	for {
		if _, err := in.ReadBytes('\n'); err != nil {
			_ = s.Abort() // the test is gone
			return err
		}
		err := s.Close(context.Background())
		fmt.Printf("%q\n", fmt.Sprint(err))
		if !errors.Is(err, ErrBusy) {
			return nil
		}
	}
}

// child is a server in a process of its own.
type child struct {
	t      *testing.T
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	stdout *bufio.Reader
	dir    string
	ended  bool
}

// serve starts a server for v on the file or device backing, and takes it down with the test.
func serve(t *testing.T, backing string, v Volume) *child {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return serveIn(t, t.TempDir(), backing, v, self, nil)
}

// serveIn is serve with everything chosen: the directory, the test binary, and as whom it runs.
func serveIn(t *testing.T, dir, backing string, v Volume, program string, as *syscall.SysProcAttr) *child {
	t.Helper()
	flags := os.O_RDWR
	if v.ReadOnly {
		flags = os.O_RDONLY
	}
	var err error
	c := &child{t: t, dir: dir, cmd: exec.Command(program)}
	c.cmd.SysProcAttr = as
	c.cmd.Env = append(os.Environ(), serveEnv+"=1")
	c.cmd.Stderr = os.Stderr
	if c.stdin, err = c.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	c.stdout = bufio.NewReader(out)
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.end)
	if err := json.NewEncoder(c.stdin).Encode(order{c.dir, backing, flags, v}); err != nil {
		t.Fatal(err)
	}
	if line, err := c.stdout.ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("the server did not start: %q, %v", line, err)
	}
	return c
}

func (c *child) path() string { return c.dir + "/" + fileName }

// close asks the server to close its export, and returns what Close returned.
func (c *child) close() error {
	if c.ended {
		return nil
	}
	if _, err := io.WriteString(c.stdin, "close\n"); err != nil {
		return err
	}
	var text string
	if _, err := fmt.Fscanf(c.stdout, "%q\n", &text); err != nil {
		return err
	}
	if text == "<nil>" {
		c.ended = true
		return c.cmd.Wait()
	}
	return errors.New(text)
}

// end takes the server down in whatever state it is.
func (c *child) end() {
	if c.ended || c.close() == nil {
		return
	}
	c.kill()
	if err := CleanStale(c.dir); err != nil {
		c.t.Errorf("clean %s: %v", c.dir, err)
	}
}

// kill ends the process as a crash would. The mount stays, dead.
func (c *child) kill() {
	c.ended = true
	_ = c.cmd.Process.Kill()
	_ = c.stdin.Close()
	waited := make(chan struct{})
	go func() { _ = c.cmd.Wait(); close(waited) }()
	select {
	case <-waited:
	case <-time.After(10 * time.Second):
		c.t.Errorf("process %d does not end", c.cmd.Process.Pid)
	}
}
