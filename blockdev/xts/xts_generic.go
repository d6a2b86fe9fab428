package xts

import "encoding/binary"

// block is 16 bytes as two little-endian words; a tweak is one, read as an element of GF(2^128).
type block struct{ lo, hi uint64 }

func load(p []byte) block {
	return block{binary.LittleEndian.Uint64(p), binary.LittleEndian.Uint64(p[8:blockSize])}
}

func (b block) store(p []byte) {
	binary.LittleEndian.PutUint64(p[8:blockSize], b.hi)
	binary.LittleEndian.PutUint64(p, b.lo)
}

func (b block) xor(c block) block { return block{b.lo ^ c.lo, b.hi ^ c.hi} }

// timesX multiplies by x modulo x^128 + x^7 + x^2 + x + 1 (IEEE 1619, 5.2).
func (b block) timesX() block {
	return block{b.lo<<1 ^ b.hi>>63*0x87, b.hi<<1 | b.lo>>63}
}

// cryptGeneric is the portable implementation, which every faster one is compared with.
func cryptGeneric(k *schedules, dst, src []byte, sector uint64, sectorSize int, decrypt bool) {
	for len(src) > 0 {
		k.cryptSector(dst[:sectorSize], src[:sectorSize], sector, decrypt)
		dst, src = dst[sectorSize:], src[sectorSize:]
		sector += uint64(sectorSize / 512)
	}
}

// cryptSector works inside dst, the tweak's encryption included: nothing is allocated, and no more than one tweak stays
// behind, on the stack. It makes three passes because a processor stalls on 16 bytes that were just written as two words,
// as AES would read them.
func (k *schedules) cryptSector(dst, src []byte, sector uint64, decrypt bool) {
	first := load(src) // before the counter takes its place, for dst may be src
	block{lo: sector}.store(dst)
	k.tweak.Encrypt(dst[:blockSize], dst[:blockSize])
	t := load(dst)
	first.xor(t).store(dst)
	whiten(dst[blockSize:], src[blockSize:], t.timesX())
	for b := dst; len(b) > 0; b = b[blockSize:] {
		if decrypt {
			k.data.Decrypt(b, b)
		} else {
			k.data.Encrypt(b, b)
		}
	}
	whiten(dst, dst, t)
}

// whiten xors the blocks of src with t, t·x, t·x² and so on.
func whiten(dst, src []byte, t block) {
	for len(src) >= blockSize && len(dst) >= blockSize {
		load(src).xor(t).store(dst)
		dst, src = dst[blockSize:], src[blockSize:]
		t = t.timesX()
	}
}
