package luks

import (
	"encoding/binary"
	"slices"
	"strconv"
)

const (
	luks1HeaderSize = 592
	luks1DigestSize = 20
	luks1Slots      = 8
	slotActive      = 0x00ac71f3
	slotDisabled    = 0x0000dead
)

// readLUKS1 reads a LUKS1 header (specification figure 1; numbers are big-endian) from the first bytes of s.
func readLUKS1(s *snapshot, b []byte, c Config) (*Header, error) {
	h := &Header{
		Version: 1, HeaderSize: luks1HeaderSize, MetadataSize: luks1HeaderSize,
		Flags: []string{}, Keyslots: []Keyslot{}, Tokens: []Token{},
	}
	var err error
	if h.UUID, err = canonicalUUID(b[168:208]); err != nil {
		return nil, err
	}
	cipher, nameOK := fixedString(b[8:40])
	mode, modeOK := fixedString(b[40:72])
	h.Segment = Segment{
		Cipher: cipher + "-" + mode, SectorSize: 512, Offset: int64(binary.BigEndian.Uint32(b[104:])) * 512, Dynamic: true,
	}
	sizes := cipherKeySizes[h.Segment.Cipher]
	if !nameOK || !modeOK || sizes == nil {
		return nil, bad("cipher", "%q is not supported", printable(h.Segment.Cipher))
	}
	keyBytes := binary.BigEndian.Uint32(b[108:])
	if keyBytes > 64 || !slices.Contains(sizes, int(keyBytes)) {
		return nil, bad("key_bytes", "%d do not fit %s", keyBytes, h.Segment.Cipher)
	}
	h.Segment.KeySize = int(keyBytes)
	hashName, _ := fixedString(b[72:104])
	if err := checkHash(hashName, "hash_spec"); err != nil {
		return nil, err
	}
	iterations := int64(binary.BigEndian.Uint32(b[164:]))
	if err := checkIterations(iterations, 1, maxDigestIterations, "mk_digest_iter"); err != nil {
		return nil, err
	}
	h.digest = digest{hash: hashName, iterations: int(iterations), salt: b[132:164], want: b[112:132]}
	if err := h.readLUKS1Slots(b[208:luks1HeaderSize], hashName); err != nil {
		return nil, err
	}
	if err := h.Segment.finish(c, h.MetadataSize, "payload_offset", "payload_offset"); err != nil {
		return nil, err
	}
	return h, h.readMaterial(s)
}

// readLUKS1Slots validates all eight slots, the disabled ones for their places too, and keeps the active ones.
func (h *Header) readLUKS1Slots(b []byte, hashName string) error {
	areas := make([]Keyslot, 0, luks1Slots)
	for id := range luks1Slots {
		p, field := b[id*48:], "keyslots."+strconv.Itoa(id)
		active, iterations := binary.BigEndian.Uint32(p), int64(binary.BigEndian.Uint32(p[4:]))
		if n := binary.BigEndian.Uint32(p[44:]); n != stripes {
			return bad(field+".stripes", "%d is not %d", n, stripes)
		}
		k := Keyslot{
			ID: id, Priority: "normal", Bound: true, KeySize: h.Segment.KeySize, AFHash: hashName,
			AreaCipher: h.Segment.Cipher, AreaKeySize: h.Segment.KeySize,
			AreaOffset: int64(binary.BigEndian.Uint32(p[40:])) * 512, AreaSize: int64(h.Segment.KeySize * stripes),
		}
		if k.AreaOffset < luks1HeaderSize {
			return bad(field+".key_material_offset", "%d lies inside the header", k.AreaOffset)
		}
		areas = append(areas, k)
		h.MetadataSize = max(h.MetadataSize, k.AreaOffset+k.AreaSize)
		switch active {
		case slotDisabled:
			continue
		case slotActive:
		default:
			return bad(field+".active", "%#08x is neither enabled nor disabled", active)
		}
		if err := checkIterations(iterations, minIterations, maxIterations, field+".iterations"); err != nil {
			return err
		}
		k.KDF = KDF{Type: "pbkdf2", Hash: hashName, Iterations: int(iterations)}
		h.Keyslots = append(h.Keyslots, k)
		h.slots = append(h.slots, slot{Keyslot: k, salt: p[8:40]})
	}
	return noOverlap(areas)
}
