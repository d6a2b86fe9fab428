package xts

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"voldek/internal/testenv"
)

// openssl encrypts lines of "key first size plain" sector by sector with OpenSSL's AES-XTS.
const openssl = `
import sys
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
for line in sys.stdin:
    key, first, size, plain = line.split()
    key, first, size, plain = bytes.fromhex(key), int(first), int(size), bytes.fromhex(plain)
    out = b""
    for i in range(0, len(plain), size):
        counter = (first + i // 512) % 2**64
        e = Cipher(algorithms.AES(key), modes.XTS(counter.to_bytes(16, "little"))).encryptor()
        out += e.update(plain[i:i+size]) + e.finalize()
    print(out.hex())
`

// A second opinion, from OpenSSL by way of python3-cryptography.
func TestOpenSSL(t *testing.T) {
	testenv.Long(t)
	python := testenv.Tool(t, "python3")
	if exec.Command(python, "-c", "import cryptography").Run() != nil {
		python = "/usr/bin/python3" // Debian's, where another one comes first
		if exec.Command(python, "-c", "import cryptography").Run() != nil {
			testenv.Skip(t, "needs python3-cryptography")
		}
	}
	type request struct {
		key, plain []byte
		first      uint64
		size       int
	}
	var requests []request
	var asked strings.Builder
	for _, keyLen := range []int{32, 64} {
		for _, size := range sectorSizes {
			for i, first := range edges {
				seed := uint64(keyLen*size + i)
				r := request{random(seed, keyLen), random(seed+1, (i*5+1)*size), first, size}
				requests = append(requests, r)
				fmt.Fprintf(&asked, "%x %d %d %x\n", r.key, r.first, r.size, r.plain)
			}
		}
	}
	cmd := exec.Command(python, "-c", openssl)
	cmd.Stdin = strings.NewReader(asked.String())
	answers, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Fields(string(answers))
	if len(lines) != len(requests) {
		t.Fatalf("%d answers to %d requests", len(lines), len(requests))
	}
	forEach(t, func(t *testing.T) {
		for i, r := range requests {
			want, err := hex.DecodeString(lines[i])
			if err != nil {
				t.Fatal(err)
			}
			c := newCipher(t, r.key)
			got := make([]byte, len(r.plain))
			c.Encrypt(got, r.plain, r.first, r.size)
			if !bytes.Equal(got, want) {
				t.Errorf("key of %d bytes, sector size %d, first sector %d: differs at byte %d",
					len(r.key), r.size, r.first, mismatch(got, want))
			}
			c.Decrypt(got, got, r.first, r.size)
			if !bytes.Equal(got, r.plain) {
				t.Errorf("key of %d bytes, sector size %d, first sector %d: decrypted differs at byte %d",
					len(r.key), r.size, r.first, mismatch(got, r.plain))
			}
		}
	})
}
