// Package xts encrypts and decrypts runs of disk sectors with AES-XTS (IEEE 1619), a whole request in one call. It does
// not know volumes, headers or files: it gets a key, bytes and the number of the first sector.
package xts

import "fmt"

const blockSize = 16

// tier is one of the implementations. Which of them a processor can run is found once, at start.
type tier uint8

const (
	generic    tier = iota // crypto/aes, a block at a time
	aesNI                  // eight blocks in 128-bit registers
	avx2VAES               // AVX2 with VAES and VPCLMULQDQ: 16 blocks in 256-bit registers
	avx512VAES             // AVX-512 with VAES and VPCLMULQDQ: 32 blocks in 512-bit registers
	armAES                 // the AES instructions of ARMv8, eight blocks
)

func (t tier) String() string {
	return [...]string{"generic", "aesni", "avx2-vaes", "avx512-vaes", "arm64-aes"}[t]
}

// chosen is the tier of the ciphers that New makes: the best one.
var chosen = tiers[0]

// Cipher is AES-XTS under one key. Encrypt and Decrypt may be called from several goroutines at once; Wipe must not run
// while they do. Who made it with New must Wipe it.
type Cipher struct {
	keys *schedules // nil after Wipe
	tier tier
}

// New expands a key of 32 bytes (AES-128-XTS) or 64 bytes (AES-256-XTS): the first half encrypts the data, the second
// half the tweak. Other lengths are an error. The key stays the caller's and is not kept; the expanded form lives in
// locked memory of its own.
func New(key []byte) (*Cipher, error) {
	if len(key) != 32 && len(key) != 64 {
		return nil, fmt.Errorf("xts: key is %d bytes long, not 32 or 64", len(key))
	}
	keys, err := expand(chosen, key[:len(key)/2], key[len(key)/2:])
	if err != nil {
		return nil, fmt.Errorf("xts: %w", err)
	}
	return &Cipher{keys, chosen}, nil
}

// Encrypt encrypts the sectors in src into dst. The tweak of the first one is firstSector, a count of 512-byte units
// whatever the size of a sector is; the next sector's is sectorSize/512 more, modulo 2^64 (this is the plain64 IV of
// LUKS and dm-crypt). sectorSize is 512, 1024, 2048 or 4096 bytes; src is any number of whole sectors, also none; dst is
// at least as long and either begins where src begins or does not overlap it. Anything else panics.
func (c *Cipher) Encrypt(dst, src []byte, firstSector uint64, sectorSize int) {
	keys := c.check(dst, src, sectorSize)
	crypt(c.tier, keys, dst, src, firstSector, sectorSize, false)
}

// Decrypt is the inverse of Encrypt, with the same rules.
func (c *Cipher) Decrypt(dst, src []byte, firstSector uint64, sectorSize int) {
	keys := c.check(dst, src, sectorSize)
	crypt(c.tier, keys, dst, src, firstSector, sectorSize, true)
}

// Wipe clears the expanded keys and gives their memory back. It may be called on nil and more than once; using the
// cipher afterwards panics.
func (c *Cipher) Wipe() {
	if c == nil || c.keys == nil {
		return
	}
	c.keys.wipe()
	c.keys = nil
}

// Implementation names the code that does the work on this machine: "avx512-vaes", "avx2-vaes", "aesni", "arm64-aes" or "generic".
func (c *Cipher) Implementation() string { return c.tier.String() }

// check panics unless the arguments obey the rules of Encrypt. The code behind it, assembly included, relies on them.
func (c *Cipher) check(dst, src []byte, sectorSize int) *schedules {
	switch sectorSize {
	case 512, 1024, 2048, 4096:
	default:
		panic("xts: sector size is not 512, 1024, 2048 or 4096")
	}
	if len(src)&(sectorSize-1) != 0 {
		panic("xts: src is not a whole number of sectors")
	}
	if len(dst) < len(src) {
		panic("xts: dst shorter than src")
	}
	if overlap(dst[:len(src)], src) {
		panic("xts: dst and src overlap in part")
	}
	if c.keys == nil {
		panic("xts: used after Wipe")
	}
	return c.keys
}
