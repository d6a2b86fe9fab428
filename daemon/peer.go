package daemon

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// PeerRule says which local users may speak on the control socket: root, the daemon's own user, and the members of Group.
// The socket's mode says the same; the rule also holds where the mode was changed or the socket was passed on.
type PeerRule struct {
	Group int // -1: none
}

// NoGroup is the rule for root and the daemon's own user.
var NoGroup = PeerRule{Group: -1}

// GroupRule is the rule for root, the daemon's own user and the members of a group; "" is NoGroup.
func GroupRule(group string) (PeerRule, error) {
	if group == "" {
		return NoGroup, nil
	}
	g, err := user.LookupGroup(group)
	if err != nil {
		return NoGroup, fmt.Errorf("%w: group of the control socket: %w", ErrRequest, err)
	}
	id, err := strconv.Atoi(g.Gid)
	return PeerRule{Group: id}, err
}

// Listen makes the control socket, which nobody can connect to before its mode is set. A socket that a dead daemon left is
// replaced; one that answers is ErrBusy.
func Listen(path string, rule PeerRule) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	if conn, err := net.Dial("unix", path); err == nil {
		_ = conn.Close()
		return nil, fmt.Errorf("%w: another daemon answers on %s", ErrBusy, path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	old := unix.Umask(0o177)
	listener, err := net.Listen("unix", path)
	unix.Umask(old)
	if err != nil || rule.Group < 0 {
		return listener, err
	}
	return listener, errors.Join(os.Chown(path, -1, rule.Group), os.Chmod(path, 0o660))
}

func (p PeerRule) allows(peer *unix.Ucred) bool {
	if peer.Uid == 0 || int(peer.Uid) == os.Geteuid() {
		return true
	}
	if p.Group < 0 {
		return false
	}
	if int(peer.Gid) == p.Group {
		return true
	}
	account, err := user.LookupId(strconv.Itoa(int(peer.Uid)))
	if err != nil {
		return false
	}
	groups, err := account.GroupIds()
	return err == nil && slices.Contains(groups, strconv.Itoa(p.Group))
}

// peerListener closes the connections of peers that are not allowed.
type peerListener struct {
	net.Listener
	allowed PeerRule
}

func (l *peerListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		peer, err := peerOf(conn)
		if err == nil && l.allowed.allows(peer) {
			return conn, nil
		}
		_ = conn.Close()
	}
}

// peerOf asks the kernel who connected (SO_PEERCRED, unix(7)).
func peerOf(conn net.Conn) (peer *unix.Ucred, err error) {
	c, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, fmt.Errorf("%T is not a unix socket", conn)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	if ctlErr := raw.Control(func(fd uintptr) {
		peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); ctlErr != nil {
		return nil, ctlErr
	}
	return peer, err
}
