package luks

import (
	"cmp"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"
)

// The LUKS2 metadata as the specification's section 3 lays it out; see decode for what the types stand for. Key slots,
// segments and tokens are looked into by their type first, so that an error speaks of what is not supported and not of
// an unknown field.
type rootJSON struct {
	Config   configJSON         `luks:"config"`
	Keyslots map[int]*node      `luks:"keyslots"`
	Digests  map[int]digestJSON `luks:"digests"`
	Segments map[int]*node      `luks:"segments"`
	Tokens   map[int]*node      `luks:"tokens"`
}

type configJSON struct {
	JSONSize     uint64   `luks:"json_size"`
	KeyslotsSize uint64   `luks:"keyslots_size"`
	Flags        []string `luks:"flags,optional"`
	Requirements struct {
		Mandatory []string `luks:"mandatory,optional"`
	} `luks:"requirements,optional"`
}

type keyslotJSON struct {
	Type     string `luks:"type"`
	KeySize  int    `luks:"key_size"`
	Priority int    `luks:"priority,optional"`
	AF       struct {
		Type    string `luks:"type"`
		Stripes int    `luks:"stripes"`
		Hash    string `luks:"hash"`
	} `luks:"af"`
	Area struct {
		Type       string `luks:"type"`
		Offset     uint64 `luks:"offset"`
		Size       uint64 `luks:"size"`
		Encryption string `luks:"encryption"`
		KeySize    int    `luks:"key_size"`
	} `luks:"area"`
	KDF *node `luks:"kdf"`
}

type pbkdf2JSON struct {
	Type       string `luks:"type"`
	Hash       string `luks:"hash"`
	Iterations int    `luks:"iterations"`
	Salt       []byte `luks:"salt"`
}

type argon2JSON struct {
	Type   string `luks:"type"`
	Time   int    `luks:"time"`
	Memory int    `luks:"memory"`
	CPUs   int    `luks:"cpus"`
	Salt   []byte `luks:"salt"`
}

type segmentJSON struct {
	Type       string   `luks:"type"`
	Offset     uint64   `luks:"offset"`
	Size       string   `luks:"size"`
	IVTweak    uint64   `luks:"iv_tweak"`
	Encryption string   `luks:"encryption"`
	SectorSize int      `luks:"sector_size"`
	Flags      []string `luks:"flags,optional"`
}

type digestJSON struct {
	Type       string `luks:"type"`
	Keyslots   []int  `luks:"keyslots"`
	Segments   []int  `luks:"segments"`
	Hash       string `luks:"hash"`
	Iterations int    `luks:"iterations"`
	Salt       []byte `luks:"salt"`
	Digest     []byte `luks:"digest"`
}

// activationFlags are the persistent flags of cryptsetup; none of them changes what the data looks like.
var activationFlags = []string{
	"allow-discards", "same-cpu-crypt", "submit-from-crypt-cpus", "no-journal", "no-read-workqueue", "no-write-workqueue",
}

const maxKeyslotsSize = 128 << 20 // LUKS2_MAX_KEYSLOTS_SIZE

// fill decodes into the struct that into points to.
func fill(n *node, field string, into any) error {
	return decode(n, field, reflect.ValueOf(into).Elem())
}

// readMetadata validates the JSON metadata and fills h with it.
func (h *Header) readMetadata(n *node, c Config) error {
	var root rootJSON
	if err := fill(n, "", &root); err != nil {
		return err
	}
	if err := h.readConfig(root.Config); err != nil {
		return err
	}
	bound, err := h.readDigests(root)
	if err != nil {
		return err
	}
	if err := h.readSegment(root.Segments, c); err != nil {
		return err
	}
	for _, id := range slices.Sorted(maps.Keys(root.Keyslots)) {
		if err := h.readKeyslot(id, root.Keyslots[id], bound[id], c.Limits); err != nil {
			return err
		}
	}
	if err := noOverlap(h.Keyslots); err != nil {
		return err
	}
	for _, id := range slices.Sorted(maps.Keys(root.Tokens)) {
		if err := h.readToken(id, root); err != nil {
			return err
		}
	}
	return nil
}

func (h *Header) readConfig(c configJSON) error {
	if len(c.Requirements.Mandatory) != 0 {
		names := printable(strings.Join(c.Requirements.Mandatory, ", "))
		return bad("config.requirements.mandatory", "%s: not supported (if it is being reencrypted, finish that first)", names)
	}
	if c.JSONSize != uint64(h.HeaderSize)-binHeaderSize {
		return bad("config.json_size", "%d in a header of %d bytes", c.JSONSize, h.HeaderSize)
	}
	if c.KeyslotsSize > maxKeyslotsSize || c.KeyslotsSize%4096 != 0 {
		return bad("config.keyslots_size", "%d is not a multiple of 4096 up to %d", c.KeyslotsSize, maxKeyslotsSize)
	}
	h.MetadataSize = 2*h.HeaderSize + int64(c.KeyslotsSize)
	for _, flag := range c.Flags {
		if !slices.Contains(activationFlags, flag) {
			return bad("config.flags", "%q is not known", printable(flag))
		}
		h.Flags = append(h.Flags, flag)
	}
	return nil
}

// readDigests validates the digests, keeps the one of the data segment, and returns for each key slot whether that
// digest covers it. Each key slot must be in exactly one digest.
func (h *Header) readDigests(root rootJSON) (bound map[int]bool, err error) {
	bound = map[int]bool{}
	for _, id := range slices.Sorted(maps.Keys(root.Digests)) {
		d, field := root.Digests[id], "digests."+strconv.Itoa(id)
		if err := checkDigest(d, field); err != nil {
			return nil, err
		}
		ofSegment := len(d.Segments) == 1 && d.Segments[0] == 0
		if !ofSegment && len(d.Segments) != 0 {
			return nil, bad(field+".segments", "only segment 0 is supported")
		}
		if ofSegment && h.digest.hash != "" {
			return nil, bad(field+".segments", "segment 0 has a digest already")
		}
		if ofSegment {
			h.digest = digest{hash: d.Hash, iterations: d.Iterations, salt: d.Salt, want: d.Digest}
		}
		for _, slot := range d.Keyslots {
			if root.Keyslots[slot] == nil {
				return nil, bad(field+".keyslots", "there is no key slot %d", slot)
			}
			if _, twice := bound[slot]; twice {
				return nil, bad(field+".keyslots", "key slot %d is in another digest too", slot)
			}
			bound[slot] = ofSegment
		}
	}
	if h.digest.hash == "" {
		return nil, bad("digests", "none covers segment 0")
	}
	for slot := range root.Keyslots {
		if _, ok := bound[slot]; !ok {
			return nil, bad("keyslots."+strconv.Itoa(slot), "no digest covers it")
		}
	}
	return bound, nil
}

func checkDigest(d digestJSON, field string) error {
	if d.Type != "pbkdf2" {
		return bad(field+".type", "%q is not supported", printable(d.Type))
	}
	if err := checkHash(d.Hash, field+".hash"); err != nil {
		return err
	}
	// A header converted from LUKS1 keeps that format's 20 bytes, whatever the hash.
	if n := len(d.Digest); n != hashes[d.Hash]().Size() && n != luks1DigestSize {
		return bad(field+".digest", "%d bytes are not what %s gives", n, d.Hash)
	}
	if err := checkSalt(d.Salt, field+".salt"); err != nil {
		return err
	}
	return checkIterations(int64(d.Iterations), 1, maxDigestIterations, field+".iterations")
}

func (h *Header) readSegment(segments map[int]*node, c Config) error {
	n := segments[0]
	if n == nil || len(segments) != 1 {
		return bad("segments", "not exactly one segment named 0")
	}
	if err := checkType(n, "segments.0", "crypt"); err != nil {
		return err
	}
	var s segmentJSON
	if err := fill(n, "segments.0", &s); err != nil {
		return err
	}
	switch {
	case len(s.Flags) != 0:
		return bad("segments.0.flags", "%q is not supported", printable(s.Flags[0]))
	case cipherKeySizes[s.Encryption] == nil:
		return bad("segments.0.encryption", "%q is not supported", printable(s.Encryption))
	case !slices.Contains([]int{512, 1024, 2048, 4096}, s.SectorSize):
		return bad("segments.0.sector_size", "%d is not supported", s.SectorSize)
	case s.Offset > maxBytes:
		return bad("segments.0.offset", "%d is too large", s.Offset)
	}
	h.Segment = Segment{
		Cipher: s.Encryption, SectorSize: s.SectorSize, Offset: int64(s.Offset), IVTweak: s.IVTweak, Dynamic: s.Size == "dynamic",
	}
	if !h.Segment.Dynamic {
		var length uint64
		if err := fill(n.member("size"), "segments.0.size", &length); err != nil {
			return err
		}
		if length > maxBytes {
			return bad("segments.0.size", "%d is too large", length)
		}
		h.Segment.Length = int64(length)
	}
	return h.Segment.finish(c, h.MetadataSize, "segments.0.offset", "segments.0.size")
}

// maxBytes bounds offsets and sizes: no sum of three of them overflows an int64.
const maxBytes = 1 << 60

// checkType checks the "type" of an object before the rest of it is decoded.
func checkType(n *node, field string, want ...string) error {
	t := n.member("type")
	if t == nil || t.kind != stringKind {
		return bad(field+".type", "missing or not a string")
	}
	if !slices.Contains(want, t.text) {
		return bad(field+".type", "%q is not supported", printable(t.text))
	}
	return nil
}

func (h *Header) readKeyslot(id int, n *node, bound bool, limits Limits) error {
	field := "keyslots." + strconv.Itoa(id)
	if err := checkType(n, field, "luks2"); err != nil {
		return err
	}
	j := keyslotJSON{Priority: 1}
	if err := fill(n, field, &j); err != nil {
		return err
	}
	if bound {
		if err := h.Segment.fitKey(j.KeySize, field+".key_size"); err != nil {
			return err
		}
	}
	s := slot{Keyslot: Keyslot{
		ID: id, Bound: bound, KeySize: j.KeySize, AFHash: j.AF.Hash, AreaCipher: j.Area.Encryption, AreaKeySize: j.Area.KeySize,
	}}
	if err := s.checkArea(j, field, h); err != nil {
		return err
	}
	if j.Priority > 2 {
		return bad(field+".priority", "%d is not supported", j.Priority)
	}
	s.Priority = [...]string{"ignore", "normal", "prefer"}[j.Priority]
	var err error
	if s.KDF, s.salt, err = readKDF(j.KDF, field+".kdf", limits); err != nil {
		return err
	}
	h.slots = append(h.slots, s)
	h.Keyslots = append(h.Keyslots, s.Keyslot)
	return nil
}

// fitKey takes the key size of the segment from a key slot, and checks that all slots agree on it.
func (s *Segment) fitKey(size int, field string) error {
	if !slices.Contains(cipherKeySizes[s.Cipher], size) {
		return bad(field, "%d bytes do not fit %s", size, s.Cipher)
	}
	if s.KeySize != 0 && s.KeySize != size {
		return bad(field, "%d bytes, another key slot has %d", size, s.KeySize)
	}
	s.KeySize = size
	return nil
}

func (s *slot) checkArea(j keyslotJSON, field string, h *Header) error {
	if j.KeySize < 1 {
		return bad(field+".key_size", "no key has %d bytes", j.KeySize)
	}
	if j.AF.Type != "luks1" {
		return bad(field+".af.type", "%q is not supported", printable(j.AF.Type))
	}
	if j.AF.Stripes != stripes {
		return bad(field+".af.stripes", "%d is not %d", j.AF.Stripes, stripes)
	}
	if err := checkHash(j.AF.Hash, field+".af.hash"); err != nil {
		return err
	}
	if j.Area.Type != "raw" {
		return bad(field+".area.type", "%q is not supported", printable(j.Area.Type))
	}
	sizes := cipherKeySizes[j.Area.Encryption]
	if sizes == nil {
		return bad(field+".area.encryption", "%q is not supported", printable(j.Area.Encryption))
	}
	if !slices.Contains(sizes, j.Area.KeySize) {
		return bad(field+".area.key_size", "%d bytes do not fit %s", j.Area.KeySize, j.Area.Encryption)
	}
	if j.Area.Offset%512 != 0 || j.Area.Offset < uint64(2*h.HeaderSize) || j.Area.Offset > uint64(h.MetadataSize) {
		return bad(field+".area.offset", "%d is not inside the key slot area", j.Area.Offset)
	}
	if j.Area.Size > uint64(h.MetadataSize)-j.Area.Offset {
		return bad(field+".area.size", "%d reaches past the key slot area", j.Area.Size)
	}
	if j.Area.Size < uint64(j.KeySize)*stripes {
		return bad(field+".area.size", "%d is too small for the key", j.Area.Size)
	}
	s.AreaOffset, s.AreaSize = int64(j.Area.Offset), int64(j.Area.Size)
	return nil
}

func readKDF(n *node, field string, limits Limits) (KDF, []byte, error) {
	if err := checkType(n, field, "pbkdf2", "argon2i", "argon2id"); err != nil {
		return KDF{}, nil, err
	}
	var kdf KDF
	var salt []byte
	if n.member("type").text == "pbkdf2" {
		var j pbkdf2JSON
		if err := fill(n, field, &j); err != nil {
			return KDF{}, nil, err
		}
		kdf, salt = KDF{Type: j.Type, Hash: j.Hash, Iterations: j.Iterations}, j.Salt
	} else {
		var j argon2JSON
		if err := fill(n, field, &j); err != nil {
			return KDF{}, nil, err
		}
		kdf, salt = KDF{Type: j.Type, Time: j.Time, MemoryKiB: j.Memory, CPUs: j.CPUs}, j.Salt
	}
	if err := checkSalt(salt, field+".salt"); err != nil {
		return KDF{}, nil, err
	}
	return kdf, salt, kdf.check(field, limits)
}

// noOverlap refuses key slots that share bytes.
func noOverlap(slots []Keyslot) error {
	byOffset := slices.SortedFunc(slices.Values(slots), func(a, b Keyslot) int { return cmp.Compare(a.AreaOffset, b.AreaOffset) })
	for i, k := range byOffset[min(1, len(byOffset)):] {
		if before := byOffset[i]; before.AreaOffset+before.AreaSize > k.AreaOffset {
			return bad("keyslots."+strconv.Itoa(k.ID)+".area.offset", "the area overlaps that of key slot %d", before.ID)
		}
	}
	return nil
}

func (h *Header) readToken(id int, root rootJSON) error {
	n, field := root.Tokens[id], "tokens."+strconv.Itoa(id)
	t := Token{ID: id}
	for name, into := range map[string]any{"type": &t.Type, "keyslots": &t.Keyslots} {
		m := n.member(name)
		if m == nil {
			return bad(join(field, name), "missing")
		}
		if err := fill(m, join(field, name), into); err != nil {
			return err
		}
	}
	for _, slot := range t.Keyslots {
		if root.Keyslots[slot] == nil {
			return bad(field+".keyslots", "there is no key slot %d", slot)
		}
	}
	t.Type, t.JSON = printable(t.Type), slices.Clone(n.raw)
	h.Tokens = append(h.Tokens, t)
	return nil
}

// readMaterial takes the encrypted key material of the slots that may be tried into memory.
func (h *Header) readMaterial(s *snapshot) error {
	for i := range h.slots {
		slot := &h.slots[i]
		if slot.AreaOffset+slot.AreaSize > s.size {
			return bad("keyslots."+strconv.Itoa(slot.ID)+".area", "ends past the end of the header device or file")
		}
		if !slot.Bound || slot.Priority == "ignore" {
			continue
		}
		var err error
		if slot.material, err = s.area(slot.AreaOffset, int64(slot.KeySize*stripes)); err != nil {
			return err
		}
	}
	return nil
}
