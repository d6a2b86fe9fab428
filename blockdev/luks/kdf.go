package luks

import (
	"context"
	"crypto/hmac"
	"crypto/subtle"
	"encoding/binary"
	"fmt"
	"hash"
	"math"
	"runtime/debug"

	"golang.org/x/crypto/argon2"
	"golang.org/x/sync/semaphore"

	"voldek/internal/secret"
)

// What a header may ask for. The upper bounds are minutes of work, far above what cryptsetup's benchmark chooses.
const (
	minIterations       = 1000
	maxIterations       = 100_000_000
	maxDigestIterations = 10_000_000 // cryptsetup aims at 1/8 s
	minSalt, maxSalt    = 8, 64      // bytes; both formats use 32
	maxArgon2CPUs       = 4
	minArgon2KiB        = 32
	maxArgon2Passes     = 256 << 20 // time x KiB: 256 GiB written
)

// maxArgon2Memory, in bytes, is above all limits: 4 GiB, or a quarter of a 32-bit address space.
const maxArgon2Memory = min(4<<30, int64(math.MaxInt)/2+1)

// check refuses costs that are off the list; field is the path of the kdf object.
func (k KDF) check(field string, limits Limits) error {
	if k.Type == "pbkdf2" {
		if err := checkHash(k.Hash, field+".hash"); err != nil {
			return err
		}
		return checkIterations(int64(k.Iterations), minIterations, maxIterations, field+".iterations")
	}
	limit := min(limits.Argon2Memory, maxArgon2Memory)
	switch {
	case k.CPUs < 1 || k.CPUs > maxArgon2CPUs:
		return bad(field+".cpus", "%d is not 1 to %d", k.CPUs, maxArgon2CPUs)
	case k.MemoryKiB < max(minArgon2KiB, 8*k.CPUs):
		return bad(field+".memory", "%d KiB is too little", k.MemoryKiB)
	case k.memory() > limit:
		return bad(field+".memory", "%s is over the limit of %s", mib(k.memory()), mib(limit))
	case k.Time < 1 || int64(k.Time)*int64(k.MemoryKiB) > maxArgon2Passes:
		return bad(field+".time", "%d passes over %s is not 1 to 256 GiB of work", k.Time, mib(k.memory()))
	}
	return nil
}

func checkHash(name, field string) error {
	if hashes[name] == nil {
		return bad(field, "%q is not supported", printable(name))
	}
	return nil
}

func checkSalt(salt []byte, field string) error {
	if len(salt) < minSalt || len(salt) > maxSalt {
		return bad(field, "%d bytes, not %d to %d", len(salt), minSalt, maxSalt)
	}
	return nil
}

func checkIterations(n, low, high int64, field string) error {
	if n < low || n > high {
		return bad(field, "%d is not %d to %d", n, low, high)
	}
	return nil
}

// memory returns the bytes that the derivation takes, 0 for PBKDF2.
func (k KDF) memory() int64 { return int64(k.MemoryKiB) << 10 }

func mib(bytes int64) string {
	if bytes%(1<<30) == 0 {
		return fmt.Sprintf("%d GiB", bytes>>30)
	}
	return fmt.Sprintf("%.4g MiB", float64(bytes)/(1<<20))
}

// derive fills key.
func (k KDF) derive(ctx context.Context, key, passphrase, salt []byte, b *Budget) error {
	if k.Type == "pbkdf2" {
		return pbkdf2(ctx, key, hashes[k.Hash], passphrase, salt, k.Iterations)
	}
	if err := b.memory.Acquire(ctx, k.memory()); err != nil {
		return fmt.Errorf("wait for %s of argon2 memory: %w", mib(k.memory()), err)
	}
	defer b.memory.Release(k.memory())
	// The blocks are on Go's heap and can't be wiped; giving their pages back to the kernel clears them, and the budget
	// is only free again when they are.
	defer debug.FreeOSMemory()
	argon2Key := argon2.IDKey
	if k.Type == "argon2i" {
		argon2Key = argon2.Key
	}
	derived := argon2Key(passphrase, salt, uint32(k.Time), uint32(k.MemoryKiB), uint8(k.CPUs), uint32(len(key)))
	copy(key, derived)
	secret.Wipe(derived)
	return nil
}

// Budget is the argon2 memory that opens running at the same time share. It is safe for concurrent use.
type Budget struct {
	memory *semaphore.Weighted
	bytes  int64
}

// NewBudget returns a budget of that many bytes.
func NewBudget(bytes int64) *Budget {
	return &Budget{memory: semaphore.NewWeighted(bytes), bytes: bytes}
}

var defaultBudget = NewBudget(DefaultLimits().Argon2Memory)

// pbkdf2 fills key (RFC 8018, HMAC). The standard library's takes the passphrase as a string, a copy that can't be wiped,
// and can't be interrupted.
func pbkdf2(ctx context.Context, key []byte, newHash func() hash.Hash, passphrase, salt []byte, iterations int) error {
	mac := hmac.New(newHash, passphrase)
	u := make([]byte, 0, mac.Size())
	block := make([]byte, mac.Size())
	defer func() { secret.Wipe(u[:cap(u)]); secret.Wipe(block) }()
	for i := uint32(1); len(key) > 0; i++ {
		mac.Reset()
		mac.Write(salt)
		mac.Write(binary.BigEndian.AppendUint32(nil, i))
		u = mac.Sum(u[:0])
		copy(block, u)
		for n := 1; n < iterations; n++ {
			if n%(1<<16) == 0 && ctx.Err() != nil {
				return ctx.Err()
			}
			mac.Reset()
			mac.Write(u)
			u = mac.Sum(u[:0])
			subtle.XORBytes(block, block, u)
		}
		key = key[copy(key, block):]
	}
	return ctx.Err()
}
