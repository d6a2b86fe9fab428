package blockdev

import (
	"encoding/hex"
	"errors"
	"strings"
	"testing"
)

// The ripemd160 and sha256 vectors are rounds of plain hashes, computed with openssl dgst:
// H(text) || H("A" + text) || H("AA" + text) …, cut to the key size.
func TestPlainKey(t *testing.T) {
	text := "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
	for _, c := range []struct {
		hash string
		size int
		want string
	}{
		{"plain", 32, hex.EncodeToString([]byte(text[:32]))},
		{"plain", 64, hex.EncodeToString([]byte(text))},
		{"sha256", 32, sha256Vector[:64]},
		{"sha256", 64, sha256Vector},
		{"ripemd160", 32, ripemdVector[:64]},
		{"ripemd160", 64, ripemdVector},
	} {
		key, err := plainKey(c.hash, []byte(text), c.size)
		if err != nil {
			t.Fatal(err)
		}
		if got := hex.EncodeToString(key.Bytes()); got != c.want {
			t.Errorf("%s, %d bytes: %s, want %s", c.hash, c.size, got, c.want)
		}
		key.Wipe()
	}
	if _, err := plainKey("plain", []byte("short"), 32); !errors.Is(err, ErrShortKey) {
		t.Errorf("a short key: %v", err)
	}
}

func TestSpecCheck(t *testing.T) {
	good := Spec{Name: "a", Device: "/dev/vdb"}
	plain := Spec{Name: "a", Device: "/dev/vdb", Type: TypePlain, Hash: "sha256"}
	for _, c := range []struct {
		name  string
		spec  Spec
		spoil func(*Spec)
		want  string // "" is accepted
	}{
		{"luks", good, func(*Spec) {}, ""},
		{"plain", plain, func(*Spec) {}, ""},
		{"name empty", good, func(s *Spec) { s.Name = "" }, "name"},
		{"name of the parent", good, func(s *Spec) { s.Name = ".." }, "name"},
		{"name with a slash", good, func(s *Spec) { s.Name = "a/b" }, "name"},
		{"name with a newline", good, func(s *Spec) { s.Name = "a\nb" }, "name"},
		{"name too long", good, func(s *Spec) { s.Name = strings.Repeat("a", 65) }, "name"},
		{"no device", good, func(s *Spec) { s.Device = "" }, "device"},
		{"relative device", good, func(s *Spec) { s.Device = "vdb" }, "device"},
		{"relative header", good, func(s *Spec) { s.Header = "h" }, "header"},
		{"via", good, func(s *Spec) { s.Via = "nbd" }, "via"},
		{"type", good, func(s *Spec) { s.Type = "bitlk" }, "type"},
		{"luks with a cipher", good, func(s *Spec) { s.Cipher = "aes-xts-plain64" }, "belong to type plain"},
		{"plain with a header", plain, func(s *Spec) { s.Header = "/h" }, "header"},
		{"plain null cipher", plain, func(s *Spec) { s.Cipher = "cipher_null-ecb" }, "cipher"},
		{"plain cipher with table fields", plain, func(s *Spec) { s.Cipher = "aes-xts-plain64 0 0" }, "cipher"},
		{"plain key size", plain, func(s *Spec) { s.KeySize = 384 }, "key_size"},
		{"plain without a hash", plain, func(s *Spec) { s.Hash = "" }, "hash is missing"},
		{"plain hash", plain, func(s *Spec) { s.Hash = "md5" }, "hash"},
		{"plain sector size", plain, func(s *Spec) { s.SectorSize = 513 }, "sector_size"},
		{"plain offset overflows", plain, func(s *Spec) { s.Offset = 1 << 60 }, "offset"},
	} {
		spec := c.spec
		c.spoil(&spec)
		err := spec.Check()
		if c.want == "" {
			if err != nil {
				t.Errorf("%s: %v", c.name, err)
			}
			continue
		}
		if !errors.Is(err, ErrUsage) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}

const (
	sha256Vector = "2a8abfa8cb9906290437854193ca6bca41d4d4e26d1d454bd66a35158095e737d016b89300be1c9dc08b7d5449573cedd2d45eb27278049bed63eb79f4f294ca"
	ripemdVector = "16779fde86bc9fa3fb2c659d8d745fdf0f2649380d1f1c19426e13c45cf62995b3257fcafc960935aa6e282e2aeb2723e15b1a1347d23d614789626e4ce8d22c"
)
