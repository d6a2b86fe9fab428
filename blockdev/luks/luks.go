// Package luks reads LUKS1 and LUKS2 metadata and opens a key slot: header bytes and a passphrase go in, the volume key
// and the geometry of the encrypted segment come out. It does not know the kernel, the network or where a passphrase
// comes from, and it never writes.
//
// A header is written by whoever can write the disk, so it is not trusted: Read takes every byte it needs exactly once
// into memory, checks it against an allow-list before any key is derived, and Unlock uses only those bytes. What is not
// on the list is refused with ErrBadHeader and the name of the field, such as
//
//	LUKS header refused: keyslots.0.kdf.memory: 4 GiB is over the limit of 1 GiB
//
// Formats: LUKS1 On-Disk Format Specification 1.2.3, LUKS2 On-Disk Format Specification 1.1.
package luks

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"unicode"

	"voldek/internal/exit"
)

// The sentinel errors. Each also carries the exit code of the command that ends with it.
var (
	// ErrNotLUKS: no LUKS magic where the formats put one.
	ErrNotLUKS = exit.New(exit.NoDevice, "no LUKS header")
	// ErrBadHeader: the header is damaged, or says something that is not on the allow-list.
	ErrBadHeader = exit.New(exit.BadHeader, "LUKS header refused")
	// ErrWrongKey: every key slot that may be tried was tried, and none opened.
	ErrWrongKey = exit.New(exit.WrongKey, "the key opens no key slot")
)

// Limits bounds what a header may ask of this host. The zero value of a field means its default.
type Limits struct {
	Argon2Memory int64 // bytes that one argon2 key slot may ask for; 4 GiB is refused above all limits
}

// DefaultLimits returns the limits that fit every volume formatted with cryptsetup's defaults: 1 GiB of argon2 memory.
func DefaultLimits() Limits { return Limits{Argon2Memory: 1 << 30} }

// Config tells Read what it can't see in the header.
type Config struct {
	Detached   bool  // the header lies apart from the data: the segment may begin at 0
	DeviceSize int64 // bytes of the data device; not used unless Detached
	Limits     Limits
}

// Header is a validated header. Its exported fields are for showing; Unlock uses the bytes that were validated. It holds
// no secret and is safe for concurrent use.
type Header struct {
	Version      int       `json:"version"` // 1 or 2
	UUID         string    `json:"uuid"`    // lower case
	Label        string    `json:"label,omitempty"`
	Subsystem    string    `json:"subsystem,omitempty"`
	SequenceID   uint64    `json:"sequence_id,omitempty"` // LUKS2: grows with each change of the header
	Copy         string    `json:"copy,omitempty"`        // LUKS2: which copy was used, "primary" or "secondary"
	Damaged      string    `json:"damaged,omitempty"`     // LUKS2: why the other copy was passed over; "" when both are good
	HeaderSize   int64     `json:"header_size"`           // bytes of one copy of the header
	MetadataSize int64     `json:"metadata_size"`         // bytes from the start to the end of the key slot area
	Flags        []string  `json:"flags"`                 // LUKS2: activation flags stored in the header, such as "allow-discards"
	Segment      Segment   `json:"segment"`
	Keyslots     []Keyslot `json:"keyslots"`
	Tokens       []Token   `json:"tokens"`

	slots  []slot
	digest digest
}

// Segment is the encrypted part of the data device.
type Segment struct {
	Cipher     string `json:"cipher"`      // one of the data ciphers, such as "aes-xts-plain64"
	KeySize    int    `json:"key_size"`    // bytes; 0 when no key slot is left
	SectorSize int    `json:"sector_size"` // bytes: 512, 1024, 2048 or 4096
	Offset     int64  `json:"offset"`      // bytes from the start of the data device, a multiple of 512
	Length     int64  `json:"length"`      // bytes, a positive multiple of SectorSize inside the data device
	Dynamic    bool   `json:"dynamic"`     // Length follows the size of the device, it is not in the header
	IVTweak    uint64 `json:"iv_tweak"`    // 512-byte sectors added to the sector number
}

// Keyslot describes one active key slot.
type Keyslot struct {
	ID          int    `json:"id"`
	Priority    string `json:"priority"` // "prefer", "normal" or "ignore"
	Bound       bool   `json:"bound"`    // it holds the key of the segment; others are never tried
	KeySize     int    `json:"key_size"` // bytes of the key inside
	KDF         KDF    `json:"kdf"`
	AFHash      string `json:"af_hash"`
	AreaCipher  string `json:"area_cipher"`
	AreaKeySize int    `json:"area_key_size"` // bytes
	AreaOffset  int64  `json:"area_offset"`   // bytes from the start of what holds the header
	AreaSize    int64  `json:"area_size"`     // bytes
}

// KDF is how a key slot turns a passphrase into a key.
type KDF struct {
	Type       string `json:"type"`                 // "pbkdf2", "argon2i" or "argon2id"
	Hash       string `json:"hash,omitempty"`       // pbkdf2: "sha1", "sha256" or "sha512"
	Iterations int    `json:"iterations,omitempty"` // pbkdf2
	Time       int    `json:"time,omitempty"`       // argon2: passes over the memory
	MemoryKiB  int    `json:"memory_kib,omitempty"` // argon2
	CPUs       int    `json:"cpus,omitempty"`       // argon2: lanes
}

// Token is a LUKS2 token. It is shown and never acted on here: whoever can write the disk wrote it.
type Token struct {
	ID       int             `json:"id"`
	Type     string          `json:"type"`
	Keyslots []int           `json:"keyslots"`
	JSON     json.RawMessage `json:"json"`
}

// Read reads and validates the header that r begins with; size is the number of bytes in r. Each byte is read at most
// once, key slot areas included. The errors are ErrNotLUKS, ErrBadHeader, or that of the reader, wrapped.
func Read(r io.ReaderAt, size int64, c Config) (*Header, error) {
	if c.Limits.Argon2Memory == 0 {
		c.Limits = DefaultLimits()
	}
	if !c.Detached {
		c.DeviceSize = size
	}
	s := &snapshot{r: r, size: size}
	start, err := s.upTo(binHeaderSize)
	if err != nil {
		return nil, err
	}
	if len(start) >= luks1HeaderSize && string(start[:6]) == primaryMagic && start[6] == 0 && start[7] == 1 {
		return readLUKS1(s, start, c)
	}
	return readLUKS2(s, c)
}

// bad returns ErrBadHeader with the field it is about and what is wrong with it.
func bad(field, format string, args ...any) error {
	return fmt.Errorf("%w: %s: %s", ErrBadHeader, field, fmt.Sprintf(format, args...))
}

// finish resolves a segment whose offset, and length unless Dynamic, come from the header, against the data device.
// metadataEnd is the first byte after header and key slots; names are those of the offset and size fields.
func (s *Segment) finish(c Config, metadataEnd int64, offsetName, sizeName string) error {
	switch {
	case s.Offset < 0 || s.Offset%512 != 0:
		return bad(offsetName, "%d is not a multiple of 512", s.Offset)
	case !c.Detached && s.Offset < metadataEnd:
		return bad(offsetName, "%d lies inside the header and key slots, which end at %d", s.Offset, metadataEnd)
	case s.Offset >= c.DeviceSize:
		return bad(offsetName, "%d lies past the end of the device, which has %d bytes", s.Offset, c.DeviceSize)
	}
	room := c.DeviceSize - s.Offset
	if s.Dynamic {
		s.Length = room - room%int64(s.SectorSize)
	}
	switch {
	case s.Length <= 0 && s.Dynamic:
		return bad(offsetName, "no whole sector of %d bytes is left after it", s.SectorSize)
	case s.Length <= 0 || s.Length%int64(s.SectorSize) != 0:
		return bad(sizeName, "%d is not a positive multiple of the sector size %d", s.Length, s.SectorSize)
	case s.Length > room:
		return bad(sizeName, "the segment ends %d bytes past the end of the device", s.Length-room)
	case s.IVTweak+uint64(s.Length/512) < s.IVTweak:
		return bad("segments.0.iv_tweak", "%d overflows the sector number", s.IVTweak)
	}
	return nil
}

// fixedString returns the bytes before the first NUL of a fixed-size field; ok tells whether there is a NUL.
func fixedString(field []byte) (text string, ok bool) {
	text, _, ok = strings.Cut(string(field), "\x00")
	return text, ok
}

// printable replaces what could upset a terminal: control characters and bytes that are no UTF-8.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, text)
}

// canonicalUUID returns the UUID of a fixed-size field in lower case.
func canonicalUUID(field []byte) (string, error) {
	text, ok := fixedString(field)
	text = strings.ToLower(text)
	if !ok || len(text) != 36 {
		return "", bad("uuid", "not a UUID")
	}
	for i, r := range text {
		dash := i == 8 || i == 13 || i == 18 || i == 23
		if dash != (r == '-') || !dash && !strings.ContainsRune("0123456789abcdef", r) {
			return "", bad("uuid", "not a UUID")
		}
	}
	return text, nil
}
