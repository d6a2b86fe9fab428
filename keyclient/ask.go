package keyclient

import (
	"context"
	"fmt"
	"io"
	"os"

	"golang.org/x/term"

	"voldek/internal/secret"
	"voldek/keyclient/call"
	"voldek/keyclient/file"
)

// Ask prompts on the controlling terminal, not on standard input or output, and reads a line without echo. It returns
// when ctx ends, with the terminal as it was; the read itself can't be interrupted, so its goroutine stays until a line
// comes or the process ends.
func Ask(ctx context.Context, prompt string) (*secret.Buffer, error) {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return nil, badRef("the key reference ask needs a terminal: %v", err)
	}
	return AskOn(ctx, tty, prompt)
}

// AskOn is Ask on the terminal tty, which it takes over and closes.
func AskOn(ctx context.Context, tty *os.File, prompt string) (*secret.Buffer, error) {
	before, err := term.GetState(int(tty.Fd()))
	if err != nil {
		_ = tty.Close()
		return nil, badRef("the key reference ask needs a terminal: %v", err)
	}
	if _, err := io.WriteString(tty, prompt); err != nil {
		_ = tty.Close()
		return nil, err
	}
	type answer struct {
		line []byte
		err  error
	}
	answers := make(chan answer, 1)
	go func() {
		line, err := term.ReadPassword(int(tty.Fd()))
		answers <- answer{line, err}
		_ = tty.Close()
	}()
	select {
	case a := <-answers:
		_, _ = fmt.Fprintln(os.Stderr)
		if a.err != nil {
			return nil, fmt.Errorf("read the passphrase: %w", a.err)
		}
		return secret.FromBytes(a.line)
	case <-ctx.Done():
		_ = term.Restore(int(tty.Fd()), before)
		return nil, fmt.Errorf("read the passphrase: %w", ctx.Err())
	}
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
