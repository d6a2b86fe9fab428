package luks

import (
	"bytes"
	"context"
	"crypto"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	second "github.com/anatol/luks.go"

	"voldek/internal/exit"
	"voldek/internal/testenv"
)

// How long a key derivation takes is not what these tests are about.
var (
	fastPBKDF2   = []string{"--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"}
	fastArgon2id = []string{"--pbkdf", "argon2id", "--pbkdf-memory", "32768", "--pbkdf-force-iterations", "4", "--pbkdf-parallel", "1"}
	fastArgon2i  = slices.Replace(slices.Clone(fastArgon2id), 1, 2, "argon2i")
)

// made is a volume that another program made: the image, its header if it lies apart, and two keys in files.
type made struct {
	t            *testing.T
	img, header  string
	key, another string // paths; only key opens the volume, unless a step says otherwise
}

func (m *made) path() string {
	if m.header != "" {
		return m.header
	}
	return m.img
}

// run runs cryptsetup on the volume's header; extra arguments follow the header's path.
func (m *made) run(args []string, extra ...string) string {
	m.t.Helper()
	return cryptsetup(m.t, append(append(args, m.path()), extra...)...)
}

func (m *made) read() (*Header, error) {
	m.t.Helper()
	f, err := os.Open(m.path())
	if err != nil {
		m.t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		m.t.Fatal(err)
	}
	data, err := os.Stat(m.img)
	if err != nil {
		m.t.Fatal(err)
	}
	return Read(f, info.Size(), Config{Detached: m.header != "", DeviceSize: data.Size()})
}

func (m *made) overwrite(at int64, b []byte) {
	m.t.Helper()
	f, err := os.OpenFile(m.path(), os.O_WRONLY, 0)
	if err != nil {
		m.t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(b, at); err != nil {
		m.t.Fatal(err)
	}
}

const key1, key2 = "6a1c0d3f55b9e07788c1f2a4", "another key"

func newMade(t *testing.T, size int64) *made {
	dir := t.TempDir()
	m := &made{t: t, img: newImage(t, dir, "image", size), key: filepath.Join(dir, "key"), another: filepath.Join(dir, "another")}
	writeFile(t, m.key, []byte(key1))
	writeFile(t, m.another, []byte(key2))
	return m
}

// formats are the volumes that must open: made by luksFormat with these arguments, then changed by the steps.
var formats = []struct {
	name   string
	format []string
	steps  func(*made)
	want   string // part of what summary says
}{
	{"luks1 256", []string{"luks1", "--key-size", "256"}, nil, "v1 aes-xts-plain64/32 sector 512 at 2097152 dynamic; 0:pbkdf2:sha256"},
	{"luks1 512", []string{"luks1", "--key-size", "512"}, nil, "v1 aes-xts-plain64/64"},
	{"luks1 sha1", []string{"luks1", "--hash", "sha1"}, nil, "0:pbkdf2:sha1"},
	{"luks1 sha512", []string{"luks1", "--hash", "sha512"}, nil, "0:pbkdf2:sha512"},
	{"luks1 essiv 128", []string{"luks1", "--cipher", "aes-cbc-essiv:sha256", "--key-size", "128"}, nil, "aes-cbc-essiv:sha256/16"},
	{"luks1 essiv 256", []string{"luks1", "--cipher", "aes-cbc-essiv:sha256", "--key-size", "256"}, nil, "aes-cbc-essiv:sha256/32"},
	{"luks1 cbc-plain", []string{"luks1", "--cipher", "aes-cbc-plain", "--key-size", "256"}, nil, "aes-cbc-plain/32"},
	{"luks1 xts-plain", []string{"luks1", "--cipher", "aes-xts-plain", "--key-size", "512"}, nil, "aes-xts-plain/64"},
	{"luks1 detached", []string{"luks1", apart}, nil, "at 0 dynamic"},
	{"luks1 8 slots", []string{"luks1", "--key-slot", "7"}, func(m *made) { m.addKeys(0, 7) }, "7:pbkdf2:sha256"},
	{"luks1 slot removed", []string{"luks1", "--key-slot", "3"}, func(m *made) {
		m.addKeys(0, 1)
		m.run([]string{"luksKillSlot"}, "0")
	}, "dynamic; 3:pbkdf2:sha256"},

	{"luks2 256", []string{"luks2", "--key-size", "256"}, nil, "v2 aes-xts-plain64/32"},
	{"luks2 512", []string{"luks2", "--key-size", "512"}, nil, "v2 aes-xts-plain64/64"},
	{"luks2 sector 512", []string{"luks2", "--sector-size", "512"}, nil, "sector 512 at 16777216 dynamic"},
	{"luks2 sector 1024", []string{"luks2", "--sector-size", "1024"}, nil, "sector 1024"},
	{"luks2 sector 2048", []string{"luks2", "--sector-size", "2048"}, nil, "sector 2048"},
	{"luks2 sector 4096", []string{"luks2", "--sector-size", "4096"}, nil, "sector 4096"},
	{"luks2 sha1", []string{"luks2", "--hash", "sha1"}, nil, "0:pbkdf2:sha1"},
	{"luks2 sha512", []string{"luks2", "--hash", "sha512"}, nil, "0:pbkdf2:sha512"},
	{"luks2 argon2id", append([]string{"luks2"}, fastArgon2id...), nil, "0:argon2id"},
	{"luks2 argon2i", append([]string{"luks2"}, fastArgon2i...), nil, "0:argon2i:"},
	{"luks2 argon2id 4 lanes", append([]string{"luks2"}, slices.Replace(slices.Clone(fastArgon2id), 7, 8, "4")...), nil, "0:argon2id"},
	{"luks2 smallest argon2", []string{"luks2", "--pbkdf", "argon2id", "--pbkdf-memory", "32", "--pbkdf-force-iterations", "4"}, nil, ""},
	{"luks2 as cryptsetup chooses", []string{"luks2", "--iter-time", "100"}, nil, ""},
	{"luks2 essiv", []string{"luks2", "--cipher", "aes-cbc-essiv:sha256", "--key-size", "256"}, nil, "aes-cbc-essiv:sha256/32"},
	{"luks2 cbc-plain64", []string{"luks2", "--cipher", "aes-cbc-plain64", "--key-size", "128"}, nil, "aes-cbc-plain64/16"},
	{"luks2 area essiv", []string{"luks2", "--keyslot-cipher", "aes-cbc-essiv:sha256", "--keyslot-key-size", "256"}, nil, "aes-xts-plain64/64"},
	{"luks2 area cbc-plain64", []string{"luks2", "--keyslot-cipher", "aes-cbc-plain64", "--keyslot-key-size", "128"}, nil, ""},
	{"luks2 area 256", []string{"luks2", "--keyslot-cipher", "aes-xts-plain64", "--keyslot-key-size", "256"}, nil, "/64"},
	{"luks2 label", []string{"luks2", "--label", "pg data", "--subsystem", "s"}, nil, "label pg data,s"},
	{"luks2 metadata 64k", []string{"luks2", "--luks2-metadata-size", "64k", "--luks2-keyslots-size", "4m"}, nil, "at 5242880"},
	{"luks2 metadata 4m", []string{"luks2", "--luks2-metadata-size", "4m", "--luks2-keyslots-size", "1m", "--offset", "32768"}, nil, ""},
	{"luks2 offset 1m", []string{"luks2", "--offset", "2048"}, nil, "at 1048576"},
	{"luks2 detached", []string{"luks2", apart}, nil, "at 0 dynamic"},
	{"luks2 32 slots", []string{"luks2", "--key-slot", "31"}, func(m *made) { m.addKeys(0, 31) }, "31:pbkdf2:sha256"},
	{"luks2 preferred", []string{"luks2", "--key-slot", "4"}, func(m *made) {
		m.addKeys(0, 2)
		m.run([]string{"config", "--key-slot", "4", "--priority", "prefer"})
	}, "4:pbkdf2:sha256 prefer"},
	{"luks2 unbound", []string{"luks2"}, func(m *made) {
		m.run(slices.Concat([]string{"luksAddKey", "--unbound", "--key-size", "128", "--key-slot", "1"}, fastPBKDF2), m.another)
	}, "1:pbkdf2:sha256 normal unbound"},
	{"luks2 large unbound", []string{"luks2"}, func(m *made) {
		m.run(slices.Concat([]string{"luksAddKey", "--unbound", "--key-size", "8192"}, fastPBKDF2), m.another)
	}, "unbound"},
	{"luks2 token", []string{"luks2"}, func(m *made) {
		writeFile(m.t, m.img+".token", []byte(`{"type":"clevis","keyslots":["0"],"jwe":{"n":1e3,"x":null}}`))
		m.run([]string{"token", "import", "--json-file", m.img + ".token"})
	}, "token clevis"},
	{"luks2 converted from luks1", []string{"luks1"}, func(m *made) { m.run([]string{"convert", "--type", "luks2"}) }, "v2 aes-xts-plain64/64"},
	{"luks1 converted from luks2", []string{"luks2", "--offset", "4096", "--sector-size", "512"}, func(m *made) {
		m.run([]string{"convert", "--type", "luks1"})
	}, "v1 aes-xts-plain64/64"},
	{"luks2 primary zeroed", []string{"luks2"}, func(m *made) { m.overwrite(0, make([]byte, 16<<10)) }, "secondary (primary header: no LUKS2 magic)"},
	{"luks2 primary damaged", []string{"luks2"}, func(m *made) { m.overwrite(5000, []byte("xx")) }, "secondary (primary header: checksum does not match)"},
	{"luks2 primary damaged 1m", []string{"luks2", "--luks2-metadata-size", "1m", "--luks2-keyslots-size", "1m"}, func(m *made) {
		m.overwrite(0, make([]byte, 4096))
	}, "secondary"},
	{"luks2 secondary zeroed", []string{"luks2"}, func(m *made) { m.overwrite(16<<10, make([]byte, 16<<10)) }, "primary (secondary header: no LUKS2 magic)"},
	{"luks2 key changed", []string{"luks2"}, func(m *made) {
		m.run(slices.Concat([]string{"luksChangeKey", "--key-file", m.key}, fastPBKDF2), m.another)
		m.run(slices.Concat([]string{"luksChangeKey", "--key-file", m.another}, fastPBKDF2), m.key)
	}, ""},
	{"luks2 header restored", []string{"luks2"}, func(m *made) {
		m.run([]string{"luksHeaderBackup", "--header-backup-file", m.img + ".backup"})
		m.overwrite(0, make([]byte, 32<<10))
		m.run([]string{"luksHeaderRestore", "--header-backup-file", m.img + ".backup"})
	}, "primary"},
}

// apart stands for --header and a file.
const apart = "--header"

// addKeys puts the other key into the slots from first up to, not including, end.
func (m *made) addKeys(first, end int) {
	for slot := first; slot < end; slot++ {
		m.run(slices.Concat([]string{"luksAddKey", "--key-file", m.key, "--key-slot", strconv.Itoa(slot)}, fastPBKDF2), m.another)
	}
}

// format formats m with the arguments of a row: the type, then options.
func (m *made) format(args []string) {
	m.t.Helper()
	args = append([]string{"luksFormat", "--key-file", m.key, "--type"}, args...)
	if i := slices.Index(args, apart); i >= 0 {
		m.header = m.img + ".header"
		args = slices.Insert(args, i+1, m.header)
	}
	if !slices.Contains(args, "--pbkdf") && !slices.Contains(args, "--iter-time") {
		args = append(args, fastPBKDF2...)
	}
	cryptsetup(m.t, append(args, m.img)...)
}

// summary says in one line what a header holds.
func summary(h *Header) string {
	s := fmt.Sprintf("v%d %s/%d sector %d at %d", h.Version, h.Segment.Cipher, h.Segment.KeySize, h.Segment.SectorSize, h.Segment.Offset)
	if h.Segment.Dynamic {
		s += " dynamic"
	}
	for _, k := range h.Keyslots {
		s += fmt.Sprintf("; %d:%s:%s %s", k.ID, k.KDF.Type, k.KDF.Hash, k.Priority)
		if !k.Bound {
			s += " unbound"
		}
	}
	for _, token := range h.Tokens {
		s += "; token " + token.Type
	}
	return s + fmt.Sprintf("; label %s,%s; %s (%s)", h.Label, h.Subsystem, h.Copy, h.Damaged)
}

// mustOpen opens the volume with its key and returns the header and the volume key.
func (m *made) mustOpen() (*Header, []byte) {
	m.t.Helper()
	h, err := m.read()
	if err != nil {
		m.t.Fatal(err)
	}
	k, err := h.Unlock(context.Background(), []byte(key1), nil)
	if err != nil {
		m.t.Fatal(err)
	}
	defer k.Key.Wipe()
	return h, bytes.Clone(k.Key.Bytes())
}

func TestVolumesOfCryptsetup(t *testing.T) {
	testenv.Long(t)
	for _, f := range formats {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			m := newMade(t, 24<<20)
			m.format(f.format)
			if f.steps != nil {
				f.steps(m)
			}
			m.agree(f.want)
		})
	}
}

func TestVolumesOfQEMU(t *testing.T) {
	testenv.Long(t)
	for _, c := range []struct{ name, options, want string }{
		{"as Nova makes it", "cipher-alg=aes-256,cipher-mode=xts,hash-alg=sha256,ivgen-alg=plain64", "v1 aes-xts-plain64/64 sector 512 at 2068480"},
		{"128 bits", "cipher-alg=aes-128,cipher-mode=xts,ivgen-alg=plain64", "v1 aes-xts-plain64/32 sector 512 at 1052672"},
		{"sha512", "hash-alg=sha512", "0:pbkdf2:sha512"},
		{"sha1 and plain", "hash-alg=sha1,ivgen-alg=plain", "v1 aes-xts-plain/64"},
		{"essiv", "cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256", "aes-cbc-essiv:sha256/32"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			m := newMade(t, 0)
			m.qemu("create", "-q", "-f", "luks", "-o", "iter-time=10,key-secret=key,"+c.options, m.img, "8M")
			m.agree(c.want)
		})
	}
}

// qemu runs a verb of qemu-img with the volume's key as the secret "key". QEMU's benchmark of PBKDF2 gives up when the clock
// of its CPU time does not tick in between (QEMU 7.2); it is then repeated.
func (m *made) qemu(verb string, args ...string) {
	m.t.Helper()
	args = append([]string{verb, "--object", "secret,id=key,file=" + m.key}, args...)
	for range 50 {
		out, err := exec.Command(testenv.Tool(m.t, "qemu-img"), args...).CombinedOutput()
		if err == nil {
			return
		}
		if !strings.Contains(string(out), "Unable to get accurate CPU usage") {
			m.t.Fatalf("qemu-img %s: %v\n%s", args, err, out)
		}
	}
	m.t.Fatal("qemu-img never gets an accurate CPU usage")
}

// agree compares what we see with what cryptsetup and luks.go see. We come first: cryptsetup may repair what it reads.
func (m *made) agree(want string) {
	t := m.t
	h, key := m.mustOpen()
	if got := summary(h); !strings.Contains(got, want) {
		t.Errorf("%q lacks %q", got, want)
	}
	if _, err := h.Unlock(context.Background(), []byte(key1+"\n"), nil); !errors.Is(err, ErrWrongKey) || exit.Of(err) != exit.WrongKey {
		t.Errorf("wrong key: %v", err)
	}
	m.agreeSecond(h, key)
	if !bytes.Equal(key, dumpVolumeKey(t, m.path(), m.key)) {
		t.Error("cryptsetup has another volume key")
	}
	if uuid := strings.TrimSpace(m.run([]string{"luksUUID"})); uuid != h.UUID {
		t.Errorf("UUID %s, cryptsetup has %s", h.UUID, uuid)
	}
}

// agreeSecond compares with luks.go, which knows one cipher and one header.
func (m *made) agreeSecond(h *Header, key []byte) {
	t := m.t
	if h.Copy == "secondary" || h.Segment.Cipher != "aes-xts-plain64" || h.Keyslots[0].AreaCipher != "aes-xts-plain64" {
		return
	}
	open := func() (second.Device, error) { return second.Open(m.img) }
	if m.header != "" {
		open = func() (second.Device, error) { return second.OpenWithHeader(m.img, m.header) }
	}
	d, err := open()
	if err != nil {
		t.Fatalf("luks.go: %v", err)
	}
	defer d.Close()
	if d.Version() != h.Version || d.UUID() != h.UUID {
		t.Errorf("luks.go sees version %d, UUID %s", d.Version(), d.UUID())
	}
	var slots []int
	for _, k := range h.Keyslots {
		slots = append(slots, k.ID)
	}
	theirs := slices.Sorted(slices.Values(d.Slots()))
	if !slices.Equal(slots, theirs) {
		t.Errorf("slots %v, luks.go sees %v", slots, theirs)
	}
	opened := 0
	for _, k := range h.Keyslots {
		if _, err := d.UnsealVolume(k.ID, []byte(key1+"\n")); err == nil {
			t.Errorf("luks.go opens slot %d with a wrong key", k.ID)
		}
		v, err := d.UnsealVolume(k.ID, []byte(key1))
		if err != nil {
			continue
		}
		opened++
		mac := hmac.New(sha256.New, key)
		mac.Write([]byte("same key"))
		if got, err := v.HMAC(crypto.SHA256, []byte("same key")); err != nil || !bytes.Equal(got, mac.Sum(nil)) {
			t.Errorf("luks.go has another volume key: %v", err)
		}
		if v.StorageEncryption != h.Segment.Cipher || int64(v.StorageOffset) != h.Segment.Offset ||
			int(v.StorageSectorSize) != h.Segment.SectorSize || v.StorageIvTweak != h.Segment.IVTweak {
			t.Errorf("luks.go sees %+v", v)
		}
	}
	if opened != 1 {
		t.Errorf("luks.go opens %d slots", opened)
	}
}

func TestVolumesThatDoNotOpen(t *testing.T) {
	testenv.Long(t)
	for _, c := range []struct {
		name, format string
		steps        func(*made)
		code         exit.Code
		want         string
	}{
		{"erased", "luks2", func(m *made) { m.run([]string{"luksErase"}) }, exit.WrongKey, "(0 tried)"},
		{"ignored slot", "luks2", func(m *made) {
			m.run([]string{"config", "--key-slot", "0", "--priority", "ignore"})
		}, exit.WrongKey, "(0 tried)"},
		{"unbound slot", "luks2", func(m *made) {
			m.run(slices.Concat([]string{"luksAddKey", "--unbound", "--key-size", "512"}, fastPBKDF2), m.another)
			m.key = m.another
		}, exit.WrongKey, "(1 tried)"},
		{"reencryption begun", "luks2", func(m *made) {
			m.run([]string{"reencrypt", "--init-only", "--force-offline-reencrypt", "--key-file", m.key})
		}, exit.BadHeader, "config.requirements.mandatory: online-reencrypt-v2"},
		{"LUKS1 essiv with sha512", "luks1", func(m *made) { m.overwrite(40, []byte("cbc-essiv:sha512\x00")) }, exit.BadHeader, "cipher"},
		{"both headers zeroed", "luks2", func(m *made) { m.overwrite(0, make([]byte, 32<<10)) }, exit.NoDevice, ""},
		{"both headers damaged", "luks2", func(m *made) {
			m.overwrite(5000, []byte("x"))
			m.overwrite(16<<10+5000, []byte("x"))
		}, exit.BadHeader, "checksum"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			m := newMade(t, 32<<20)
			m.format([]string{c.format})
			c.steps(m)
			h, err := m.read()
			if err == nil {
				_, err = h.Unlock(context.Background(), readFile(t, m.key), nil)
			}
			if exit.Of(err) != c.code || !strings.Contains(err.Error(), c.want) {
				t.Errorf("exit %d: %v", exit.Of(err), err)
			}
		})
	}
}
