// Package exit holds voldek's exit codes. The numbers are a promise to scripts: a code is never renumbered and never
// given a second meaning. It knows no other room; each room attaches a code to its own sentinel errors with New.
package exit

import (
	"context"
	"errors"
)

// Code is the exit status of a command and the "exit" field of an error on the control socket.
type Code int

// The codes. 2 is left out because the Go runtime uses it for a panic.
const (
	OK          Code = 0
	Failed      Code = 1   // see the message
	NoDevice    Code = 10  // no such device, or not LUKS
	Busy        Code = 11  // busy, or already open
	WrongKey    Code = 12  // the key opens no key slot
	NoKey       Code = 13  // the key service has no such key
	Denied      Code = 14  // the key service refused
	Unreached   Code = 15  // the key service was not reached; worth a retry
	NoBackend   Code = 16  // neither dm-crypt nor FUSE
	BadHeader   Code = 17  // header damaged or refused
	NoDaemon    Code = 18  // the daemon was not reached; worth a retry
	Usage       Code = 64  // the command line is wrong
	NotAllowed  Code = 77  // the caller may not do this
	Interrupted Code = 130 // ended by a signal
)

// words are the machine-readable names of the codes, in JSON errors and in logs.
var words = map[Code]string{
	OK: "ok", Failed: "failed", NoDevice: "no-device", Busy: "busy", WrongKey: "wrong-key", NoKey: "no-key",
	Denied: "denied", Unreached: "unreached", NoBackend: "no-backend", BadHeader: "bad-header", NoDaemon: "no-daemon",
	Usage: "usage", NotAllowed: "not-allowed", Interrupted: "interrupted",
}

// String returns the code's machine-readable name, such as "wrong-key".
func (c Code) String() string {
	if w, ok := words[c]; ok {
		return w
	}
	return words[Failed]
}

// Retry reports whether repeating the same command may succeed without anything being changed.
func (c Code) Retry() bool { return c == Unreached || c == NoDaemon }

// codedError is a sentinel that knows its code.
type codedError struct {
	code Code
	text string
}

func (e *codedError) Error() string  { return e.text }
func (e *codedError) ExitCode() Code { return e.code }

// New returns a sentinel error that carries code through any number of fmt.Errorf("…: %w") wrappings.
func New(code Code, text string) error { return &codedError{code, text} }

// Of returns the code of err: OK for nil, the first code found along its chain, Interrupted for a cancelled
// context, Failed otherwise.
func Of(err error) Code {
	if err == nil {
		return OK
	}
	var coder interface{ ExitCode() Code }
	if errors.As(err, &coder) {
		return coder.ExitCode()
	}
	if errors.Is(err, context.Canceled) {
		return Interrupted
	}
	return Failed
}
