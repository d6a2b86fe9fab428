package luks

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"hash"
	"math"
	"strings"

	"voldek/blockdev/xts"
	"voldek/internal/secret"
)

// cipherKeySizes is the allow-list of ciphers, for data and key slot areas, with their key sizes in bytes.
var cipherKeySizes = map[string][]int{
	"aes-xts-plain64":      {32, 64},
	"aes-xts-plain":        {32, 64},
	"aes-cbc-essiv:sha256": {16, 32},
	"aes-cbc-plain64":      {16, 32},
	"aes-cbc-plain":        {16, 32},
}

const (
	stripes    = 4000 // anti-forensic stripes; no tool writes another number
	sectorSize = 512  // of key slot areas, whatever the segment has
)

// decryptArea decrypts a key slot area, whose sectors count from its own start. spec is on the allow-list.
func decryptArea(dst, src []byte, spec string, key []byte) error {
	if strings.HasPrefix(spec, "aes-xts-") {
		// plain and plain64 differ only past 2^32 sectors.
		c, err := xts.New(key)
		if err != nil {
			return err
		}
		defer c.Wipe()
		c.Decrypt(dst, src, 0, sectorSize)
		return nil
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return err
	}
	iv, err := sectorIV(spec, key)
	if err != nil {
		return err
	}
	for n := 0; n < len(src); n += sectorSize {
		cipher.NewCBCDecrypter(block, iv(uint64(n/sectorSize))).CryptBlocks(dst[n:n+sectorSize], src[n:n+sectorSize])
	}
	return nil
}

// sectorIV returns the function from sector number to initialization vector of a cbc spec, as dm-crypt defines it.
func sectorIV(spec string, key []byte) (func(sector uint64) []byte, error) {
	plain64 := func(sector uint64) []byte {
		return binary.LittleEndian.AppendUint64(make([]byte, 0, aes.BlockSize), sector)[:aes.BlockSize]
	}
	switch spec {
	case "aes-cbc-plain":
		return func(sector uint64) []byte { return plain64(sector & math.MaxUint32) }, nil
	case "aes-cbc-plain64":
		return plain64, nil
	}
	sum := sha256.Sum256(key)
	defer secret.Wipe(sum[:])
	essiv, err := aes.NewCipher(sum[:])
	return func(sector uint64) []byte {
		iv := plain64(sector)
		essiv.Encrypt(iv, iv)
		return iv
	}, err
}

// afMerge recovers the key from its anti-forensic stripes (LUKS1 specification, section 2.4).
func afMerge(key, split []byte, newHash func() hash.Hash) {
	clear(key)
	h := newHash()
	sum := make([]byte, 0, h.Size())
	var number [4]byte
	last := len(split) - len(key)
	for n := 0; n < last; n += len(key) {
		subtle.XORBytes(key, key, split[n:n+len(key)])
		for i := 0; i < len(key); i += h.Size() {
			part := key[i:min(i+h.Size(), len(key))]
			h.Reset()
			binary.BigEndian.PutUint32(number[:], uint32(i/h.Size()))
			h.Write(number[:])
			h.Write(part)
			sum = h.Sum(sum[:0])
			copy(part, sum)
		}
	}
	secret.Wipe(sum[:cap(sum)])
	subtle.XORBytes(key, key, split[last:])
}
