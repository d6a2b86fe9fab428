package luks

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"encoding/json"
	"flag"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"voldek/internal/testenv"
)

// The fixtures are volumes that cryptsetup 2.6.1 made, cut down to their headers and the key material of slot 0:
//
//	testdata/luks2.img.gz  argon2id in slot 0, a preferred pbkdf2 slot 1, an unbound slot 5, a token; aes-xts-plain64
//	testdata/luks1.img.gz  pbkdf2 sha256, aes-cbc-essiv:sha256, 128 bits
//
// and beside each the volume key as cryptsetup dumps it. They are made anew by
//
//	go test ./blockdev/luks -run TestMakeFixtures -make-fixtures
var makeFixtures = flag.Bool("make-fixtures", false, "write testdata with the cryptsetup of this machine")

const fixturePassphrase = "correct horse"

func TestMakeFixtures(t *testing.T) {
	if !*makeFixtures {
		return
	}
	dir := t.TempDir()
	key, key2 := filepath.Join(dir, "key"), filepath.Join(dir, "key2")
	writeFile(t, key, []byte(fixturePassphrase))
	writeFile(t, key2, []byte("second key"))
	fast := []string{"--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"}

	img := newImage(t, dir, "luks2", 640<<10)
	cryptsetup(t, "luksFormat", "--type", "luks2", "--key-file", key, "--cipher", "aes-xts-plain64", "--key-size", "256",
		"--sector-size", "512", "--luks2-keyslots-size", "512K", "--offset", "1088", "--label", "pg-data", "--subsystem", "voldek",
		"--pbkdf", "argon2id", "--pbkdf-memory", "1024", "--pbkdf-force-iterations", "4", "--pbkdf-parallel", "1", img)
	cryptsetup(t, append([]string{"luksAddKey", "--key-file", key, "--hash", "sha512", img, key2}, fast...)...)
	cryptsetup(t, append([]string{"luksAddKey", "--unbound", "--key-size", "256", "--key-slot", "5", img, key2}, fast...)...)
	writeFile(t, filepath.Join(dir, "token"), []byte(`{"type":"voldek-test","keyslots":["0"],"ref":"barbican:x","n":-1.5e3}`))
	cryptsetup(t, "token", "import", "--json-file", filepath.Join(dir, "token"), img)
	cryptsetup(t, "config", "--priority", "prefer", "--key-slot", "1", img)
	keepFixture(t, img, key, 32<<10+128<<10)

	img = newImage(t, dir, "luks1", 1<<20+64<<10)
	cryptsetup(t, append([]string{"luksFormat", "--type", "luks1", "--key-file", key, "--cipher", "aes-cbc-essiv:sha256",
		"--key-size", "128", img}, fast...)...)
	keepFixture(t, img, key, 4096+64<<10)
}

// keepFixture stores an image, of which only the first bytes matter, and its volume key.
func keepFixture(t *testing.T, img, key string, bytes int) {
	b := readFile(t, img)
	clear(b[bytes:])
	var packed strings.Builder
	w, _ := gzip.NewWriterLevel(&packed, gzip.BestCompression)
	_, _ = w.Write(b)
	_ = w.Close()
	name := filepath.Join("testdata", filepath.Base(img))
	writeFile(t, name+".img.gz", []byte(packed.String()))
	writeFile(t, name+".key", dumpVolumeKey(t, img, key))
}

func cryptsetup(t testing.TB, args ...string) string {
	t.Helper()
	return testenv.Run(t, testenv.Tool(t, "cryptsetup"), append(args, "-q", "--disable-locks")...)
}

// dumpVolumeKey returns what cryptsetup says is the volume key.
func dumpVolumeKey(t testing.TB, header, keyFile string) []byte {
	t.Helper()
	out := filepath.Join(t.TempDir(), "volume-key")
	cryptsetup(t, "luksDump", "--dump-volume-key", "--volume-key-file", out, "--key-file", keyFile, header)
	return readFile(t, out)
}

func newImage(t testing.TB, dir, name string, size int64) string {
	t.Helper()
	path := filepath.Join(dir, name)
	writeFile(t, path, nil)
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

func writeFile(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// image is a volume in memory.
type image []byte

// fixture returns a fresh copy of a committed image, and its volume key.
func fixture(t testing.TB, name string) (image, []byte) {
	t.Helper()
	r, err := gzip.NewReader(bytes.NewReader(readFile(t, filepath.Join("testdata", name+".img.gz"))))
	if err != nil {
		t.Fatal(err)
	}
	img, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return img, readFile(t, filepath.Join("testdata", name+".key"))
}

// open reads and unlocks an image, and returns a copy of the volume key.
func (img image) open(c Config, passphrase string) (*Header, []byte, error) {
	h, err := Read(bytes.NewReader(img), int64(len(img)), c)
	if err != nil {
		return nil, nil, err
	}
	k, err := h.Unlock(context.Background(), []byte(passphrase), nil)
	if err != nil {
		return h, nil, err
	}
	defer k.Key.Wipe()
	return h, bytes.Clone(k.Key.Bytes()), nil
}

// The two headers of the LUKS2 fixture.
const fixtureHeaderSize = 16 << 10

// seal writes right checksums into both LUKS2 headers.
func (img image) seal() {
	for _, at := range []int{0, fixtureHeaderSize} {
		b := img[at : at+fixtureHeaderSize]
		alg, _ := fixedString(b[72:104])
		newHash, ok := hashes[alg]
		if !ok {
			continue
		}
		clear(b[448:512])
		h := newHash()
		h.Write(b)
		copy(b[448:512], h.Sum(nil))
	}
}

// text returns a copy of the LUKS2 metadata.
func (img image) text() []byte {
	text, _, _ := bytes.Cut(img[binHeaderSize:fixtureHeaderSize], []byte{0})
	return bytes.Clone(text)
}

// setText replaces the metadata in both headers.
func (img image) setText(text []byte) {
	for _, at := range []int{binHeaderSize, fixtureHeaderSize + binHeaderSize} {
		area := img[at : at+fixtureHeaderSize-binHeaderSize]
		clear(area)
		copy(area, text)
	}
	img.seal()
}

// put writes bytes at the same place of both LUKS2 headers.
func (img image) put(at int, b ...byte) {
	copy(img[at:], b)
	copy(img[fixtureHeaderSize+at:], b)
	img.seal()
}

func be32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }
func be64(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }

// replace replaces text in the metadata.
func (img image) replace(old, new string) {
	text := img.text()
	if !bytes.Contains(text, []byte(old)) {
		panic("the metadata has no " + old)
	}
	img.setText(bytes.Replace(text, []byte(old), []byte(new), 1))
}

// set sets the value at a path such as "keyslots.0.kdf.time"; nil deletes it.
func (img image) set(path string, value any) {
	var root map[string]any
	d := json.NewDecoder(bytes.NewReader(img.text()))
	d.UseNumber()
	if err := d.Decode(&root); err != nil {
		panic(err)
	}
	names := strings.Split(path, ".")
	at := root
	for _, name := range names[:len(names)-1] {
		at = at[name].(map[string]any)
	}
	if last := names[len(names)-1]; value == nil {
		delete(at, last)
	} else {
		at[last] = value
	}
	text, err := json.Marshal(root)
	if err != nil {
		panic(err)
	}
	img.setText(text)
}
