package fusedev

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"
)

// mount is a FUSE mount: the connection to the kernel, and where it hangs.
type mount struct {
	fd     int
	dir    string
	direct bool // by mount(2); otherwise by fusermount3
}

// mountAt mounts on dir. The source shows as name, the type as fuse.voldek.
func mountAt(dir, name string, readOnly bool) (*mount, error) {
	if name == "" {
		name = "voldek"
	}
	m, err := mountDirect(dir, name, readOnly)
	if errors.Is(err, unix.EPERM) {
		m, err = mountHelper(dir, name, readOnly)
	}
	return m, err
}

func mountDirect(dir, name string, readOnly bool) (*mount, error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: open /dev/fuse: %w", ErrUnavailable, err)
	}
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC)
	if readOnly {
		flags |= unix.MS_RDONLY
	}
	data := fmt.Sprintf("fd=%d,rootmode=%o,user_id=%d,group_id=%d,max_read=%d,default_permissions",
		fd, unix.S_IFDIR, os.Geteuid(), os.Getegid(), maxData)
	if err := unix.Mount(name, dir, "fuse.voldek", flags, data); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("mount: %w", err)
	}
	return &mount{fd, dir, true}, nil
}

// mountHelper lets the setuid program fusermount3 mount, which sends the connection over a socket.
func mountHelper(dir, name string, readOnly bool) (*mount, error) {
	program, err := fusermount()
	if err != nil {
		return nil, errNoHelper
	}
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(ends[0]), "fusermount"), os.NewFile(uintptr(ends[1]), "fusermount")
	defer ours.Close()
	defer theirs.Close()

	escaped := strings.NewReplacer(`\`, `\\`, `,`, `\,`).Replace(name)
	options := fmt.Sprintf("nosuid,nodev,noexec,default_permissions,subtype=voldek,max_read=%d,fsname=%s", maxData, escaped)
	if readOnly {
		options += ",ro"
	}
	cmd := exec.Command(program, "-o", options, "--", dir)
	cmd.ExtraFiles = []*os.File{theirs} // descriptor 3 over there
	cmd.Env = append(os.Environ(), "_FUSE_COMMFD=3", "LC_ALL=C")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrUnavailable, bytes.TrimSpace(out), err)
	}
	fd, err := receiveFD(ends[0])
	if err != nil {
		return nil, fmt.Errorf("take the connection from fusermount3: %w", err)
	}
	return &mount{fd, dir, false}, nil
}

func receiveFD(socket int) (int, error) {
	var one [1]byte
	control := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(socket, one[:], control, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return -1, err
	}
	messages, err := unix.ParseSocketControlMessage(control[:n])
	if err != nil {
		return -1, err
	}
	for _, m := range messages {
		if fds, err := unix.ParseUnixRights(&m); err == nil && len(fds) == 1 {
			return fds[0], nil
		}
	}
	return -1, errors.New("no descriptor received")
}

// unmount is refused with EBUSY while the mount is in use. That nothing is mounted any more is no error.
func (m *mount) unmount() error {
	if !m.direct {
		return runFusermount("-u", "--", m.dir)
	}
	err := unix.Unmount(m.dir, unix.UMOUNT_NOFOLLOW)
	if err == unix.EINVAL || err == unix.ENOENT {
		return nil
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", m.dir, err)
	}
	return nil
}

// detach is a lazy unmount: it works while the mount is in use.
func (m *mount) detach() error { return detach(m.dir) }

func detach(dir string) error {
	err := unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	switch err {
	case nil, unix.EINVAL, unix.ENOENT:
		return nil
	case unix.EPERM:
		return runFusermount("-uz", "--", dir)
	}
	return fmt.Errorf("unmount %s: %w", dir, err)
}

// CleanStale unmounts what a server that died has left on dir: a mount whose every use fails with ENOTCONN. Anything else
// there, also a living mount or nothing at all, is left alone, without an error.
func CleanStale(dir string) error {
	var stat unix.Statfs_t // statfs always asks the server; the attributes of a dead one may still be cached
	if err := unix.Statfs(dir, &stat); err != unix.ENOTCONN {
		return nil
	}
	return detach(dir)
}

// fusermount finds the setuid helper.
func fusermount() (string, error) {
	if path, err := exec.LookPath("fusermount3"); err == nil {
		return path, nil
	}
	return exec.LookPath("/usr/bin/fusermount3")
}

// runFusermount gives its complaints the error numbers they stand for.
func runFusermount(args ...string) error {
	program, err := fusermount()
	if err != nil {
		return err
	}
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	text := string(bytes.TrimSpace(out))
	switch {
	case err == nil, strings.Contains(text, "not found in /etc/mtab"), strings.Contains(text, "Invalid argument"):
		return nil
	case strings.Contains(text, "busy"):
		return fmt.Errorf("%s: %w", text, unix.EBUSY)
	}
	return fmt.Errorf("%s: %w", text, err)
}

// mayMount reports whether this process has CAP_SYS_ADMIN.
func mayMount() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	return unix.Capget(&header, &data[0]) == nil && data[0].Effective&(1<<unix.CAP_SYS_ADMIN) != 0
}
