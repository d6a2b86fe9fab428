package luks

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"voldek/blockdev/xts"
	"voldek/internal/testenv"
)

// plaintext returns bytes whose like is nowhere else: a wrong sector number or key shows.
func plaintext(size int) []byte {
	b := make([]byte, size)
	r := rand.NewChaCha8([32]byte([]byte("plaintext of the volume's sectors")))
	_, _ = r.Read(b)
	return b
}

// crypt runs the data of a segment through XTS with the header's geometry.
func crypt(t *testing.T, h *Header, key, data []byte, encrypt bool) []byte {
	t.Helper()
	c, err := xts.New(key)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Wipe()
	out := make([]byte, len(data))
	if encrypt {
		c.Encrypt(out, data, h.Segment.IVTweak, h.Segment.SectorSize)
	} else {
		c.Decrypt(out, data, h.Segment.IVTweak, h.Segment.SectorSize)
	}
	return out
}

// data returns the bytes of the segment.
func (m *made) data(h *Header) []byte {
	m.t.Helper()
	return readFile(m.t, m.img)[h.Segment.Offset:][:h.Segment.Length]
}

var geometries = []struct {
	name string
	args []string
}{
	{"256 bits, sector 512", []string{"--key-size", "256", "--sector-size", "512"}},
	{"512 bits, sector 512", []string{"--key-size", "512", "--sector-size", "512"}},
	{"256 bits, sector 4096", []string{"--key-size", "256", "--sector-size", "4096"}},
	{"512 bits, sector 4096", []string{"--key-size", "512", "--sector-size", "4096"}},
}

const dataSize = 4 << 20

// cryptsetup's offline reencryption reads and writes LUKS2 data without device-mapper, with OpenSSL's AES.
func reencrypt(m *made, direction string, args ...string) {
	m.t.Helper()
	args = append([]string{"reencrypt", direction, "--force-offline-reencrypt", "--resilience", "none", "--key-file", m.key}, args...)
	cryptsetup(m.t, append(args, m.img)...)
}

func TestDataEncryptedByCryptsetup(t *testing.T) {
	testenv.Long(t)
	encrypt := slices.Concat([]string{"--type", "luks2", "--cipher", "aes-xts-plain64"}, fastPBKDF2)
	for _, g := range geometries {
		t.Run(g.name+", detached", func(t *testing.T) {
			m := newMade(t, 0)
			writeFile(t, m.img, plaintext(dataSize))
			m.header = m.img + ".header"
			reencrypt(m, "--encrypt", slices.Concat(encrypt, g.args, []string{apart, m.header})...)
			h, key := m.mustOpen()
			if !bytes.Equal(crypt(t, h, key, m.data(h), false), plaintext(dataSize)) {
				t.Error("the data decrypts to something else")
			}
		})
		t.Run(g.name+", in place", func(t *testing.T) {
			m := newMade(t, 0)
			writeFile(t, m.img, append(plaintext(dataSize), make([]byte, 16<<20)...))
			reencrypt(m, "--encrypt", slices.Concat(encrypt, g.args, []string{"--reduce-device-size", "16M"})...)
			h, key := m.mustOpen()
			if !bytes.HasPrefix(crypt(t, h, key, m.data(h), false), plaintext(dataSize)) {
				t.Error("the data decrypts to something else")
			}
			key[0] ^= 1
			if bytes.HasPrefix(crypt(t, h, key, m.data(h), false), plaintext(dataSize)) {
				t.Error("another key decrypts the data too: this test sees nothing")
			}
		})
	}
}

func TestDataReencryptedByCryptsetup(t *testing.T) {
	testenv.Long(t)
	m := newMade(t, dataSize)
	m.format([]string{"luks2", apart, "--key-size", "256", "--sector-size", "512"})
	h, key := m.mustOpen()
	writeFile(t, m.img, crypt(t, h, key, plaintext(dataSize), true))
	cryptsetup(t, slices.Concat([]string{"reencrypt", "--force-offline-reencrypt", "--resilience", "none", "--key-file", m.key,
		"--key-size", "512", "--sector-size", "4096", apart, m.header}, fastPBKDF2, []string{m.img})...)
	h, key = m.mustOpen()
	if len(key) != 64 || h.Segment.SectorSize != 4096 {
		t.Errorf("the volume was not changed: %s", summary(h))
	}
	if !bytes.Equal(crypt(t, h, key, m.data(h), false), plaintext(dataSize)) {
		t.Error("the data decrypts to something else")
	}
}

func TestOurDataDecryptedByCryptsetup(t *testing.T) {
	testenv.Long(t)
	for _, g := range geometries {
		t.Run(g.name, func(t *testing.T) {
			m := newMade(t, dataSize)
			m.format(append([]string{"luks2", apart}, g.args...))
			h, key := m.mustOpen()
			writeFile(t, m.img, crypt(t, h, key, plaintext(dataSize), true))
			reencrypt(m, "--decrypt", apart, m.header)
			if !bytes.Equal(readFile(t, m.img), plaintext(dataSize)) {
				t.Error("cryptsetup decrypts our data to something else")
			}
		})
	}
}

func TestDataSharedWithQEMU(t *testing.T) {
	testenv.Long(t)
	for _, cipher := range []string{"aes-128", "aes-256"} {
		t.Run(cipher, func(t *testing.T) {
			m := newMade(t, 0)
			raw := filepath.Join(t.TempDir(), "raw")
			writeFile(t, raw, plaintext(dataSize))
			m.qemu("convert", "-f", "raw", "-O", "luks", "-o", "iter-time=10,key-secret=key,cipher-alg="+cipher, raw, m.img)
			h, key := m.mustOpen()
			if !bytes.Equal(crypt(t, h, key, m.data(h), false), plaintext(dataSize)) {
				t.Error("QEMU's data decrypts to something else")
			}

			other := plaintext(dataSize)
			slices.Reverse(other)
			m.overwrite(h.Segment.Offset, crypt(t, h, key, other, true))
			if err := os.Remove(raw); err != nil {
				t.Fatal(err)
			}
			m.qemu("convert", "--image-opts", "driver=luks,key-secret=key,file.filename="+m.img, "-O", "raw", raw)
			if !bytes.Equal(readFile(t, raw), other) {
				t.Error("QEMU decrypts our data to something else")
			}
		})
	}
}
