package daemon

import (
	"fmt"
	"net"
	"os"
	"os/user"
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
