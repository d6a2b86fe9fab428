package luks

import (
	"context"
	"crypto/subtle"
	"fmt"

	"voldek/internal/secret"
)

// VolumeKey is the key of the data segment, and the key slot that gave it. The caller wipes Key.
type VolumeKey struct {
	Key     *secret.Buffer
	Keyslot int
}

// slot is what is needed to try a passphrase on a key slot.
type slot struct {
	Keyslot
	salt     []byte
	material []byte // the encrypted stripes; nil for a slot that is never tried
}

// digest proves a volume key.
type digest struct {
	hash       string
	iterations int
	salt, want []byte
}

// Unlock tries the passphrase on the key slots, those of priority "prefer" first; unbound slots and those of priority
// "ignore" are never tried. No slot opened is ErrWrongKey. Argon2 memory is taken from b, from a budget shared by the
// process when b is nil; a slot that asks for more than the whole budget is ErrBadHeader before anything is derived. The
// passphrase stays the caller's and is not copied. A cancelled ctx ends the work between slots, in the wait for memory
// and within PBKDF2; a running argon2 ends by itself.
func (h *Header) Unlock(ctx context.Context, passphrase []byte, b *Budget) (*VolumeKey, error) {
	if b == nil {
		b = defaultBudget
	}
	for _, s := range h.slots {
		if s.KDF.memory() > b.bytes && s.material != nil {
			return nil, bad(fmt.Sprintf("keyslots.%d.kdf.memory", s.ID), "%s is over the budget of %s", mib(s.KDF.memory()), mib(b.bytes))
		}
	}
	tried := 0
	for _, priority := range []string{"prefer", "normal"} {
		for _, s := range h.slots {
			if s.material == nil || s.Priority != priority {
				continue
			}
			tried++
			key, err := s.open(ctx, passphrase, h.digest, b)
			if err != nil {
				return nil, fmt.Errorf("open key slot %d: %w", s.ID, err)
			}
			if key != nil {
				return &VolumeKey{Key: key, Keyslot: s.ID}, nil
			}
		}
	}
	return nil, fmt.Errorf("%w (%d tried)", ErrWrongKey, tried)
}

// open returns the key in the slot if the passphrase is the right one, else nil.
func (s *slot) open(ctx context.Context, passphrase []byte, d digest, b *Budget) (*secret.Buffer, error) {
	areaKey, err := secret.New(s.AreaKeySize)
	if err != nil {
		return nil, err
	}
	defer areaKey.Wipe()
	if err := s.KDF.derive(ctx, areaKey.Bytes(), passphrase, s.salt, b); err != nil {
		return nil, err
	}
	split, err := secret.New(len(s.material))
	if err != nil {
		return nil, err
	}
	defer split.Wipe()
	if err := decryptArea(split.Bytes(), s.material, s.AreaCipher, areaKey.Bytes()); err != nil {
		return nil, err
	}
	key, err := secret.New(s.KeySize)
	if err != nil {
		return nil, err
	}
	afMerge(key.Bytes(), split.Bytes(), hashes[s.AFHash])
	ok, err := d.matches(ctx, key.Bytes())
	if err != nil || !ok {
		key.Wipe()
		return nil, err
	}
	return key, nil
}

// matches tells whether key is the one the digest was made of.
func (d digest) matches(ctx context.Context, key []byte) (bool, error) {
	got := make([]byte, len(d.want))
	if err := pbkdf2(ctx, got, hashes[d.hash], key, d.salt, d.iterations); err != nil {
		return false, err
	}
	return subtle.ConstantTimeCompare(got, d.want) == 1, nil
}
