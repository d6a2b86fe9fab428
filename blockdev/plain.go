package blockdev

import (
	"crypto/sha256"
	"fmt"
	"hash"

	"golang.org/x/crypto/ripemd160" //lint:ignore SA1019 cryptsetup up to 2.6 hashed every plain-mode passphrase with it
	"voldek/internal/secret"
)

var plainHashes = map[string]func() hash.Hash{"sha256": sha256.New, "ripemd160": ripemd160.New}

// plainKey turns the bytes of a key into the volume key of a plain volume, as cryptsetup does for a passphrase on
// standard input (lib/crypt_plain.c): round r hashes r letters "A" and then the key, and the rounds are joined and cut to
// size bytes. Hash "plain" takes the first size bytes as they are. The caller wipes the result.
func plainKey(hashName string, key []byte, size int) (*secret.Buffer, error) {
	if hashName == "plain" {
		if len(key) < size {
			return nil, fmt.Errorf("%w: %d bytes, want %d", ErrShortKey, len(key), size)
		}
		key = key[:size]
	}
	volumeKey, err := secret.New(size)
	if err != nil {
		return nil, err
	}
	out := volumeKey.Bytes()
	if hashName == "plain" {
		copy(out, key)
		return volumeKey, nil
	}
	for round := 0; len(out) > 0; round++ {
		h := plainHashes[hashName]()
		for range round {
			h.Write([]byte{'A'})
		}
		h.Write(key)
		sum := h.Sum(nil)
		out = out[copy(out, sum):]
		secret.Wipe(sum)
	}
	return volumeKey, nil
}
