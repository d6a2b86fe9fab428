package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"debug/buildinfo"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"voldek/internal/cli"
)

// room is a directory in memory with a key, volumes and the daemons that open them.
type room struct {
	dir, key        string
	voldek, voldekd string
}

// newRoom makes the directory in TMPDIR where that is set, else in /dev/shm: disks would be measured otherwise.
func newRoom() (*room, error) {
	b := &room{}
	for name, path := range map[string]*string{"voldek": &b.voldek, "voldekd": &b.voldekd} {
		var err error
		if *path, err = filepath.Abs(filepath.Join("bin", name)); err != nil {
			return nil, err
		}
		if _, err := buildinfo.ReadFile(*path); err != nil {
			return nil, fmt.Errorf("%w; build it first: make build", err)
		}
	}
	parent := os.Getenv("TMPDIR")
	if parent == "" {
		parent = "/dev/shm"
	}
	dir, err := os.MkdirTemp(parent, "voldek-bench-")
	if err != nil {
		return nil, err
	}
	b.dir, b.key = dir, filepath.Join(dir, "key")
	secret := make([]byte, 32)
	_, _ = rand.Read(secret) // never fails
	if err := os.WriteFile(b.key, []byte(hex.EncodeToString(secret)), 0o600); err != nil {
		b.remove()
		return nil, err
	}
	return b, nil
}

func (b *room) remove() { _ = os.RemoveAll(b.dir) }

// filesystem names what the volumes lie on.
func (b *room) filesystem() string {
	var stat unix.Statfs_t
	if err := unix.Statfs(b.dir, &stat); err == nil && stat.Type == unix.TMPFS_MAGIC {
		return "tmpfs"
	}
	return "not tmpfs"
}

// format makes a volume of size bytes with one cheap key slot, so that its key derivation does not hide the rest.
func (b *room) format(ctx context.Context, name, kind string, size int64) (string, error) {
	path := filepath.Join(b.dir, name+".img")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return "", err
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		return "", err
	}
	args := []string{"luksFormat", "--batch-mode", "--type", kind, "--cipher", "aes-xts-plain64", "--key-size", "512",
		"--hash", "sha256", "--pbkdf-force-iterations", "1000", "--key-file", b.key}
	if kind == "luks2" {
		args = append(args, "--pbkdf", "pbkdf2")
	}
	_, err = timed(exec.CommandContext(ctx, "cryptsetup", append(args, path)...))
	return path, err
}

// timed runs a program to its end and returns the seconds from fork to exit. A failure comes with what the program said.
// When its context ends, the program may clean up: fio has children.
func timed(cmd *exec.Cmd) (float64, error) {
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	var said bytes.Buffer
	cmd.Stderr = &said
	start := time.Now()
	err := cmd.Run()
	seconds := time.Since(start).Seconds()
	if err != nil {
		return 0, fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, bytes.TrimSpace(said.Bytes()))
	}
	return seconds, nil
}

// daemon is a voldekd of our own.
type daemon struct {
	room   *room
	cmd    *exec.Cmd
	run    string
	socket string
	log    bytes.Buffer
	ended  chan struct{}
}

// startDaemon starts a voldekd and returns once it answers. The caller stops it.
func (b *room) startDaemon() (*daemon, error) {
	d := &daemon{room: b, run: filepath.Join(b.dir, "run"), socket: filepath.Join(b.dir, "socket"), ended: make(chan struct{})}
	config := filepath.Join(b.dir, "voldek.toml")
	if err := os.WriteFile(config, fmt.Appendf(nil, "[daemon]\nrun_dir = %q\n", d.run), 0o600); err != nil {
		return nil, err
	}
	d.cmd = exec.Command(b.voldekd, "--config", config, "--socket", d.socket)
	d.cmd.Stderr = &d.log
	if err := d.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(d.ended)
		_ = d.cmd.Wait()
	}()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		conn, err := net.Dial("unix", d.socket)
		if err == nil {
			return d, conn.Close()
		}
		if d.hasEnded() || time.Now().After(deadline) {
			d.stop()
			return nil, fmt.Errorf("voldekd does not answer: %w\n%s", err, d.log.String())
		}
	}
}

func (d *daemon) hasEnded() bool {
	select {
	case <-d.ended:
		return true
	default:
		return false
	}
}

// stop ends the daemon, however it takes it, and unmounts what it may have left.
func (d *daemon) stop() {
	_ = d.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-d.ended:
	case <-time.After(90 * time.Second): // longer than voldekd waits for users of its volumes
		_ = d.cmd.Process.Kill()
		<-d.ended
	}
	left, _ := filepath.Glob(filepath.Join(d.run, "fuse", "*"))
	for _, dir := range left {
		_ = unix.Unmount(dir, unix.MNT_DETACH)
	}
}

// voldek is a command of the CLI to this daemon.
func (d *daemon) voldek(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, d.room.voldek, append([]string{"--socket", d.socket}, args...)...)
}

func (d *daemon) attach(ctx context.Context, volume, name, via string) *exec.Cmd {
	return d.voldek(ctx, "attach", volume, "--key", "file:"+d.room.key, "--name", name, "--via", via)
}

// progress shows a person how far the run is; an empty text wipes the line.
func progress(format string, args ...any) {
	if cli.IsTerminal(os.Stderr) {
		fmt.Fprintf(os.Stderr, "\r\033[K"+format, args...)
	}
}
