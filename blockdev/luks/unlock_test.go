package luks

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	stdpbkdf2 "crypto/pbkdf2"
	"encoding/hex"
	"encoding/json"
	"errors"
	"hash"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"voldek/blockdev/xts"
	"voldek/internal/exit"
)

func TestPBKDF2IsTheStandardLibrarys(t *testing.T) {
	for name, newHash := range hashes {
		for _, c := range []struct{ iterations, size int }{{1, 1}, {2, 20}, {1000, 32}, {3, 64}, {1000, 64}, {2, 129}} {
			want, err := stdpbkdf2.Key(newHash, "pass\xffword", []byte("salt"), c.iterations, c.size)
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, c.size)
			if err := pbkdf2(context.Background(), got, newHash, []byte("pass\xffword"), []byte("salt"), c.iterations); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("%s, %d iterations, %d bytes: %x, want %x", name, c.iterations, c.size, got, want)
			}
		}
	}
}

// The reference implementation's own vectors (phc-winner-argon2, test.c, version 0x13).
func TestArgon2(t *testing.T) {
	for _, c := range []struct {
		kdf  KDF
		want string
	}{
		{KDF{Type: "argon2i", Time: 2, MemoryKiB: 256, CPUs: 1}, "89e9029f4637b295beb027056a7336c414fadd43f6b208645281cb214a56452f"},
		{KDF{Type: "argon2id", Time: 2, MemoryKiB: 256, CPUs: 1}, "9dfeb910e80bad0311fee20f9c0e2b12c17987b4cac90c2ef54d5b3021c68bfe"},
	} {
		key := make([]byte, 32)
		if err := c.kdf.derive(context.Background(), key, []byte("password"), []byte("somesalt"), defaultBudget); err != nil {
			t.Fatal(err)
		}
		if hex.EncodeToString(key) != c.want {
			t.Errorf("%s: %x", c.kdf.Type, key)
		}
	}
}

// afSplit is the inverse of afMerge, with stripes that are not random.
func afSplit(key []byte, newHash func() hash.Hash) []byte {
	split := make([]byte, len(key)*stripes)
	copy(split, plaintext(len(key)*(stripes-1)))
	merged := make([]byte, len(key))
	afMerge(merged, split, newHash) // the last stripe is zero: this is what it is combined with
	for i := range key {
		split[len(split)-len(key)+i] = merged[i] ^ key[i]
	}
	return split
}

func TestAFMerge(t *testing.T) {
	for name, newHash := range hashes {
		for _, size := range []int{16, 32, 64} {
			key := plaintext(size)
			split := afSplit(key, newHash)
			got := make([]byte, size)
			if afMerge(got, split, newHash); !bytes.Equal(got, key) {
				t.Errorf("%s, %d bytes: not merged", name, size)
			}
			for _, n := range []int{0, len(split) / 2, len(split) - 1} {
				split[n] ^= 1
				if afMerge(got, split, newHash); bytes.Equal(got, key) {
					t.Errorf("%s, %d bytes: byte %d does not matter", name, size, n)
				}
				split[n] ^= 1
			}
		}
	}
}

// The sectors of an area have numbers of their own, counted from its start; each mode turns them into another vector.
func TestAreaCiphers(t *testing.T) {
	plain, key := plaintext(32<<10), plaintext(64)
	for spec, sizes := range cipherKeySizes {
		for _, size := range sizes {
			area := encryptArea(t, plain, spec, key[:size])
			got := make([]byte, len(area))
			if err := decryptArea(got, area, spec, key[:size]); err != nil || !bytes.Equal(got, plain) {
				t.Errorf("%s, %d bytes: %v", spec, size, err)
			}
			if bytes.Equal(area[:512], plain[:512]) {
				t.Errorf("%s does not encrypt", spec)
			}
		}
	}
}

func encryptArea(t *testing.T, src []byte, spec string, key []byte) []byte {
	dst := make([]byte, len(src))
	if strings.HasPrefix(spec, "aes-xts") {
		c, err := xts.New(key)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Wipe()
		for n := 0; n < len(src); n += 512 {
			c.Encrypt(dst[n:n+512], src[n:n+512], uint64(n/512), 512)
		}
		return dst
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	iv, err := sectorIV(spec, key)
	if err != nil {
		t.Fatal(err)
	}
	for n := 0; n < len(src); n += 512 {
		cipher.NewCBCEncrypter(block, iv(uint64(n/512))).CryptBlocks(dst[n:n+512], src[n:n+512])
	}
	return dst
}

func TestSectorIV(t *testing.T) {
	key := make([]byte, 16)
	for _, c := range []struct {
		spec   string
		sector uint64
		want   string
	}{
		{"aes-cbc-plain", 1<<32 + 5, "05000000000000000000000000000000"},
		{"aes-cbc-plain64", 1<<32 + 5, "05000000010000000000000000000000"},
		// AES-256 under SHA-256 of sixteen zeros, of the block 0; computed with openssl.
		{"aes-cbc-essiv:sha256", 0, "1241af55378b61479bea1edf69c40f16"},
	} {
		iv, err := sectorIV(c.spec, key)
		if err != nil {
			t.Fatal(err)
		}
		if got := hex.EncodeToString(iv(c.sector)); got != c.want {
			t.Errorf("%s of %d: %s", c.spec, c.sector, got)
		}
	}
}

func TestBudgetSmallerThanASlot(t *testing.T) {
	img, _ := fixture(t, "luks2")
	h, err := Read(bytes.NewReader(img), int64(len(img)), Config{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = h.Unlock(context.Background(), []byte(fixturePassphrase), NewBudget(1<<20-1))
	if exit.Of(err) != exit.BadHeader || !strings.Contains(err.Error(), "keyslots.0.kdf.memory") {
		t.Errorf("exit %d: %v", exit.Of(err), err)
	}
	if _, err := Read(bytes.NewReader(img), int64(len(img)), Config{Limits: Limits{Argon2Memory: 1<<20 - 1}}); exit.Of(err) != exit.BadHeader {
		t.Errorf("exit %d: %v", exit.Of(err), err)
	}
}

// Opens that run at the same time wait for each other's memory, and the wait ends with the context.
func TestBudgetIsSharedAndTheWaitCanBeCancelled(t *testing.T) {
	img, _ := fixture(t, "luks2")
	h, err := Read(bytes.NewReader(img), int64(len(img)), Config{})
	if err != nil {
		t.Fatal(err)
	}
	b := NewBudget(1 << 20)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			k, err := h.Unlock(context.Background(), []byte(fixturePassphrase), b)
			if err != nil {
				t.Error(err)
				return
			}
			k.Key.Wipe()
		})
	}
	wg.Wait()
	if err := b.memory.Acquire(context.Background(), 1<<20); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if _, err := h.Unlock(ctx, []byte(fixturePassphrase), b); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}

func TestPBKDF2IsInterrupted(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	start := time.Now()
	err := pbkdf2(ctx, make([]byte, 32), hashes["sha256"], []byte("p"), []byte("salt"), maxIterations)
	if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 5*time.Second {
		t.Errorf("after %v: %v", time.Since(start), err)
	}
}

func TestCancelledBeforeTheFirstSlot(t *testing.T) {
	img, _ := fixture(t, "luks1")
	h, err := Read(bytes.NewReader(img), int64(len(img)), Config{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := h.Unlock(ctx, []byte(fixturePassphrase), nil); exit.Of(err) != exit.Interrupted {
		t.Error(err)
	}
}

// The memory of argon2 goes back to the kernel, not to Go's heap.
func TestArgon2MemoryIsGivenBack(t *testing.T) {
	img, _ := fixture(t, "luks2")
	img.set("keyslots.0.kdf.memory", 64<<10)
	_, _, err := img.open(Config{}, fixturePassphrase)
	if !errors.Is(err, ErrWrongKey) { // the slot was made with other costs
		t.Fatal(err)
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	if kept := m.HeapSys - m.HeapReleased; kept > 48<<20 {
		t.Errorf("%d MiB are kept", kept>>20)
	}
}

func TestHeaderAsJSON(t *testing.T) {
	img, key := fixture(t, "luks2")
	h, _, err := img.open(Config{}, fixturePassphrase)
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(h)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"cipher":"aes-xts-plain64"`, `"priority":"prefer"`, `"ref":"barbican:x"`, `"memory_kib":1024`} {
		if !bytes.Contains(text, []byte(want)) {
			t.Errorf("%s lacks %s", text, want)
		}
	}
	if bytes.Contains(text, key) || bytes.Contains(text, []byte("salt")) {
		t.Error("the header shows more than it should")
	}
}
