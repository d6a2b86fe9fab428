// Package api holds the words that are spoken on the control socket: HTTP with JSON on a unix socket, version 1. It does
// not know who speaks them. Fields are only ever added; a field whose meaning changed would be version 2.
//
//	GET    /v1/volumes           Volumes
//	GET    /v1/volumes/{name}    Answer
//	PUT    /v1/volumes/{name}    AttachRequest -> Answer     idempotent
//	DELETE /v1/volumes/{name}    -> Answer                   idempotent
//	GET    /v1/events            Event, one JSON object a line: all states of now, then every change, until the caller hangs up
//
// An AttachRequest is a JSON body, or, when the caller brings the key along (references - and ask), a multipart/form-data
// body whose first part "request" is the JSON and whose second part "key" is the key, which never passes through JSON.
package api

import (
	"time"

	"voldek/blockdev"
	"voldek/internal/exit"
)

// Version is the "version" of every answer.
const Version = 1

// DefaultSocket is where voldekd listens.
const DefaultSocket = "/run/voldek/voldek.sock"

// MaxRequest bounds an AttachRequest, MaxKey the key beside it, in bytes (cryptsetup's own limit for a key file).
const (
	MaxRequest = 64 << 10
	MaxKey     = 8 << 20
)

// State is where a volume is on its way; daemon/state.go has the drawing.
type State string

// The states.
const (
	Detached  State = "detached"
	Fetching  State = "fetching"
	Unlocking State = "unlocking"
	Open      State = "open"
	Closing   State = "closing"
	Failed    State = "failed"
)

// AttachRequest asks for a volume to be open.
type AttachRequest struct {
	blockdev.Spec
	Keys    []string `json:"keys"`              // key references, tried in order
	Timeout float64  `json:"timeout,omitempty"` // seconds for fetching the key; 0: the daemon's default
}

// Volume is what the daemon tells of a volume.
type Volume struct {
	Name       string       `json:"name"`
	Device     string       `json:"device"`
	Header     string       `json:"header,omitempty"`
	Export     string       `json:"export,omitempty"` // block device or file with the plaintext, while open
	Via        blockdev.Via `json:"via,omitempty"`
	State      State        `json:"state"`
	Since      time.Time    `json:"since"` // of this state, UTC
	Type       string       `json:"type,omitempty"`
	UUID       string       `json:"uuid,omitempty"`
	Cipher     string       `json:"cipher,omitempty"`
	KeyBits    int          `json:"key_bits,omitempty"`
	SectorSize int          `json:"sector_size,omitempty"` // bytes
	Size       int64        `json:"size,omitempty"`        // bytes of plaintext
	ReadOnly   bool         `json:"read_only,omitempty"`
	Key        string       `json:"key,omitempty"`     // the reference whose key opened it
	Keyslot    *int         `json:"keyslot,omitempty"` // absent in plain mode
	AtBoot     bool         `json:"at_boot,omitempty"`
	Steps      *Steps       `json:"steps,omitempty"` // how long the last attach took
	Error      *Error       `json:"error,omitempty"` // why the last attach failed
}

// Steps are the seconds that each step of an attach took.
type Steps struct {
	Header  float64 `json:"header"`  // open the device, read and validate the header
	Fetch   float64 `json:"fetch"`   // get the key from the key service
	Keyslot float64 `json:"keyslot"` // derive and prove the volume key
	Export  float64 `json:"export"`  // dm-crypt or FUSE
	Total   float64 `json:"total"`
}

// Answer is one volume, or what became of it.
type Answer struct {
	Version int     `json:"version"`
	Volume  *Volume `json:"volume,omitempty"`
	Error   *Error  `json:"error,omitempty"`
}

// Volumes are all volumes, by name.
type Volumes struct {
	Version int      `json:"version"`
	Volumes []Volume `json:"volumes"`
}

// Event is a change of a volume's state.
type Event struct {
	Version int       `json:"version"`
	Time    time.Time `json:"time"`
	Name    string    `json:"name"`
	State   State     `json:"state"`
	Error   *Error    `json:"error,omitempty"`
}

// Error is why something was not done.
type Error struct {
	Code    string    `json:"code"`
	Exit    exit.Code `json:"exit"`
	Message string    `json:"message"`
	Hint    string    `json:"hint,omitempty"`
}

func (e *Error) Error() string       { return e.Message }
func (e *Error) ExitCode() exit.Code { return e.Exit }

// NewError turns err into words: its own where it comes from a daemon, else those of its exit code.
func NewError(err error, hint string) *Error {
	code := exit.Of(err)
	return &Error{Code: code.String(), Exit: code, Message: err.Error(), Hint: hint}
}
