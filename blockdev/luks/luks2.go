package luks

import (
	"bytes"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"slices"
	"strings"
)

const (
	primaryMagic   = "LUKS\xba\xbe"
	secondaryMagic = "SKUL\xba\xbe"
	binHeaderSize  = 4096 // the binary part of a LUKS2 header; its JSON follows
)

// headerSizes are the sizes a LUKS2 header may have, and so the places of its second copy.
var headerSizes = []int64{16 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20}

// hashes are the hash functions a header may name: LUKS2 checksums, PBKDF2, anti-forensic splitting, digests.
var hashes = map[string]func() hash.Hash{"sha1": sha1.New, "sha256": sha256.New, "sha512": sha512.New}

// binHeader is one copy of a LUKS2 header whose checksum is right. Its fields are not yet validated.
type binHeader struct {
	size, sequenceID uint64
	raw              []byte
}

// The fields of the binary header, LUKS2 specification section 2.1; numbers are big-endian.
func (b *binHeader) label() []byte     { return b.raw[24:72] }
func (b *binHeader) uuid() []byte      { return b.raw[168:208] }
func (b *binHeader) subsystem() []byte { return b.raw[208:256] }
func (b *binHeader) jsonArea() []byte  { return b.raw[binHeaderSize:] }

var errNoMagic = errors.New("no LUKS2 magic")

// readCopy reads the copy at offset. The error is errNoMagic, ErrBadHeader for a damaged copy, or the reader's.
func readCopy(s *snapshot, offset int64, name, magic string) (*binHeader, error) {
	b, err := s.upTo(offset + binHeaderSize)
	if err != nil {
		return nil, err
	}
	b = b[min(offset, int64(len(b))):]
	if !bytes.HasPrefix(b, []byte(magic)) {
		return nil, errNoMagic
	}
	if len(b) < binHeaderSize {
		return nil, bad(name, "cut off after %d bytes", len(b))
	}
	if version := binary.BigEndian.Uint16(b[6:]); version != 2 {
		return nil, bad(name, "version %d is not supported", version)
	}
	size := binary.BigEndian.Uint64(b[8:])
	if size > 4<<20 || !slices.Contains(headerSizes, int64(size)) || offset != 0 && int64(size) != offset {
		return nil, bad(name, "hdr_size %d is none of the specification's for this place", size)
	}
	if at := binary.BigEndian.Uint64(b[256:]); at != uint64(offset) {
		return nil, bad(name, "hdr_offset is %d in the header found at %d", at, offset)
	}
	if b, err = s.upTo(offset + int64(size)); err != nil {
		return nil, err
	}
	if int64(len(b)) < offset+int64(size) {
		return nil, bad(name, "hdr_size %d reaches past the end", size)
	}
	raw := b[offset:]
	if err := verifyChecksum(raw, name); err != nil {
		return nil, err
	}
	return &binHeader{size: size, sequenceID: binary.BigEndian.Uint64(raw[16:]), raw: raw}, nil
}

// verifyChecksum compares the checksum field with the hash of the copy, in which that field counts as zero.
func verifyChecksum(raw []byte, name string) error {
	alg, _ := fixedString(raw[72:104])
	newHash, ok := hashes[alg]
	if !ok {
		return bad(name, "checksum_alg %q is not supported", printable(alg))
	}
	h := newHash()
	h.Write(raw[:448])
	h.Write(make([]byte, 64))
	h.Write(raw[512:])
	if !bytes.Equal(h.Sum(nil), raw[448:448+h.Size()]) {
		return bad(name, "checksum does not match")
	}
	return nil
}

// choice is the copy that is used, its name, and why the other one was passed over.
type choice struct {
	*binHeader
	name, damaged string
}

// chooseCopy returns the valid copy with the newest sequence id. The second copy lies at hdr_size; when the first is
// damaged, it is searched for at the places the specification lists.
func chooseCopy(s *snapshot) (*choice, error) {
	first, firstErr := readCopy(s, 0, "primary header", primaryMagic)
	if firstErr == nil {
		second, err := readCopy(s, int64(first.size), "secondary header", secondaryMagic)
		if damaged(err) {
			return &choice{first, "primary", reason("secondary header", err)}, nil
		}
		if err != nil {
			return nil, err
		}
		return newest(first, second)
	}
	if !damaged(firstErr) {
		return nil, firstErr
	}
	worst := firstErr
	for _, size := range headerSizes {
		second, err := readCopy(s, size, "secondary header", secondaryMagic)
		if err == nil {
			return &choice{second, "secondary", reason("primary header", firstErr)}, nil
		}
		if !damaged(err) {
			return nil, err
		}
		if worst == errNoMagic {
			worst = err
		}
	}
	if worst == errNoMagic {
		return nil, ErrNotLUKS
	}
	return nil, fmt.Errorf("%w; no other good copy", worst)
}

// damaged tells that a copy can't be used, in contrast to an error of the reader.
func damaged(err error) bool { return errors.Is(err, errNoMagic) || errors.Is(err, ErrBadHeader) }

// reason is the text of why the named copy was passed over.
func reason(name string, err error) string {
	if errors.Is(err, errNoMagic) {
		return name + ": " + err.Error()
	}
	return strings.TrimPrefix(err.Error(), ErrBadHeader.Error()+": ")
}

func newest(first, second *binHeader) (*choice, error) {
	older := "%s header: sequence id %d is older than %d"
	switch a, b := first.sequenceID, second.sequenceID; {
	case !bytes.Equal(first.uuid(), second.uuid()):
		return nil, bad("uuid", "the two headers have different ones")
	case a > b:
		return &choice{first, "primary", fmt.Sprintf(older, "secondary", b, a)}, nil
	case a < b:
		return &choice{second, "secondary", fmt.Sprintf(older, "primary", a, b)}, nil
	case !bytes.Equal(first.jsonArea(), second.jsonArea()):
		return nil, bad("json", "the two headers differ but have the same sequence id %d", a)
	}
	return &choice{first, "primary", ""}, nil
}

// readLUKS2 reads a LUKS2 header; what is neither LUKS1 nor LUKS2 ends here as ErrNotLUKS.
func readLUKS2(s *snapshot, c Config) (*Header, error) {
	b, err := chooseCopy(s)
	if err != nil {
		return nil, err
	}
	h := &Header{
		Version: 2, SequenceID: b.sequenceID, HeaderSize: int64(b.size), Copy: b.name, Damaged: b.damaged,
		Flags: []string{}, Keyslots: []Keyslot{}, Tokens: []Token{},
	}
	if h.UUID, err = canonicalUUID(b.uuid()); err != nil {
		return nil, err
	}
	label, labelOK := fixedString(b.label())
	subsystem, subsystemOK := fixedString(b.subsystem())
	if !labelOK || !subsystemOK {
		return nil, bad("label", "label or subsystem does not end")
	}
	h.Label, h.Subsystem = printable(label), printable(subsystem)

	text, rest, ok := bytes.Cut(b.jsonArea(), []byte{0})
	if !ok || len(bytes.Trim(rest, "\x00")) != 0 {
		return nil, bad("json", "not one text followed by NULs only")
	}
	root, err := parseJSON(text)
	if err != nil {
		return nil, bad("json", "%v", err)
	}
	if err := h.readMetadata(root, c); err != nil {
		return nil, err
	}
	return h, h.readMaterial(s)
}
