package keyclient

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"voldek/internal/secret"
	"voldek/keyclient/call"
	"voldek/keyclient/file"
)

// maxLine is what a terminal passes on of one line, in bytes (N_TTY_BUF_SIZE).
const maxLine = 4096

// Ask prompts on the controlling terminal, not on standard input or output, and reads a line without echo until ctx ends.
// It leaves the terminal as it was.
func Ask(ctx context.Context, prompt string) (*secret.Buffer, error) {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return nil, badRef("the key reference ask needs a terminal: %v", err)
	}
	defer tty.Close()
	return askOn(ctx, tty, prompt)
}

// askOn turns the echo off before the prompt appears, so that nothing typed after it is shown. It must not call tty.Fd,
// which would make the read one that can't be interrupted.
func askOn(ctx context.Context, tty *os.File, prompt string) (*secret.Buffer, error) {
	restore, err := echoOff(tty)
	if err != nil {
		return nil, fmt.Errorf("prompt on the terminal: %w", err)
	}
	defer restore()
	if _, err := io.WriteString(tty, prompt); err != nil {
		return nil, fmt.Errorf("prompt on the terminal: %w", err)
	}
	defer context.AfterFunc(ctx, func() { _ = tty.SetReadDeadline(time.Now()) })()
	room, err := secret.New(maxLine)
	if err != nil {
		return nil, err
	}
	defer room.Wipe()
	n, err := tty.Read(room.Bytes()) // a terminal hands out whole lines
	_, _ = io.WriteString(tty, "\n")
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	if err != nil {
		return nil, fmt.Errorf("read the passphrase: %w", err)
	}
	if n > 0 && room.Bytes()[n-1] == '\n' {
		n--
	}
	return shrink(room, n)
}

// echoOff stops the terminal from showing what is typed, until restore.
func echoOff(tty *os.File) (restore func(), err error) {
	raw, err := tty.SyscallConn()
	if err != nil {
		return nil, err
	}
	var before *unix.Termios
	set := func(t *unix.Termios) error {
		var failed error
		err := raw.Control(func(fd uintptr) { failed = unix.IoctlSetTermios(int(fd), unix.TCSETS, t) })
		return errors.Join(err, failed)
	}
	var failed error
	err = raw.Control(func(fd uintptr) { before, failed = unix.IoctlGetTermios(int(fd), unix.TCGETS) })
	if err := errors.Join(err, failed); err != nil {
		return nil, err
	}
	silent := *before
	silent.Lflag &^= unix.ECHO
	return func() { _ = set(before) }, set(&silent)
}

// readStdin reads r to its end, as cryptsetup --key-file=- does. The room doubles, so that a short key on a host with a
// small limit of locked memory does not take the room of the longest.
func readStdin(r io.Reader) (*secret.Buffer, error) {
	room, err := secret.New(4096)
	if err != nil {
		return nil, err
	}
	defer func() { room.Wipe() }()
	n := 0
	for {
		m, err := r.Read(room.Bytes()[n:])
		n += m
		switch {
		case err == io.EOF && n == 0:
			return nil, fmt.Errorf("standard input: %w: it is empty", call.ErrNoKey)
		case err == io.EOF:
			return shrink(room, n)
		case err != nil:
			return nil, fmt.Errorf("standard input: %w", err)
		case n > file.MaxKey:
			return nil, fmt.Errorf("standard input: %w: more than %d bytes", call.ErrContentType, file.MaxKey)
		case n == room.Len():
			wider, err := secret.New(2 * n)
			if err != nil {
				return nil, err
			}
			copy(wider.Bytes(), room.Bytes())
			room.Wipe()
			room = wider
		}
	}
}

func shrink(room *secret.Buffer, n int) (*secret.Buffer, error) {
	b, err := secret.New(n)
	if err != nil {
		return nil, err
	}
	copy(b.Bytes(), room.Bytes()[:n])
	return b, nil
}
