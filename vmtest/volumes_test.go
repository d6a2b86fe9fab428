package vmtest

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"voldek/internal/testenv"
)

// volume is one of the VM's disks: a LUKS volume with an ext4 that holds the file "from-host".
type volume struct {
	name, disk string
	kind       string // as cryptsetup status says
	cipher     string
	keyBits    int
	sectorSize int
	fuse       bool // a cipher that the FUSE backend has
	build      func(t *testing.T, v *volume, plain, key, image string)
}

// volumes in the order of the VM's disks. The last disk, plainDisk, is empty.
var volumes = []volume{
	{"luks2", "/dev/vda", "LUKS2", "aes-xts-plain64", 512, 512, true, luks2},
	{"luks2-4k", "/dev/vdb", "LUKS2", "aes-xts-plain64", 256, 4096, true, luks2},
	{"luks1", "/dev/vdc", "LUKS1", "aes-xts-plain64", 512, 512, true, luks1},
	{"luks1-essiv", "/dev/vdd", "LUKS1", "aes-cbc-essiv:sha256", 256, 512, false, luks1},
}

const (
	plainDisk = "/dev/vde"
	keyFile   = "/key" // in the VM
	volumeKey = "a passphrase of 32 bytes, exactly"
)

// content is what the named file of a volume holds: some blocks and a piece.
func content(volume, file string) []byte {
	var seed [32]byte
	copy(seed[:], volume+"/"+file)
	data := make([]byte, 300_001)
	_, _ = rand.NewChaCha8(seed).Read(data)
	return data
}

// make builds the image: an ext4 with from-host in it, then encrypted without device-mapper.
func (v *volume) make(t *testing.T, key, image string) {
	t.Helper()
	dir := t.TempDir()
	files := filepath.Join(dir, "files")
	if err := os.Mkdir(files, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(files, "from-host"), content(v.name, "from-host"), 0o644); err != nil {
		t.Fatal(err)
	}
	plain := filepath.Join(dir, "plain")
	sparse(t, plain, 16<<20)
	testenv.Run(t, testenv.Tool(t, "mke2fs"), "-q", "-F", "-t", "ext4", "-b", "4096", "-d", files, plain)
	v.build(t, v, plain, key, image)
}

// luks2 encrypts in place: cryptsetup needs room behind the file system for the header, which it moves to the front.
func luks2(t *testing.T, v *volume, plain, key, image string) {
	t.Helper()
	if err := os.Rename(plain, image); err != nil {
		t.Fatal(err)
	}
	grow(t, image, 16<<20)
	testenv.Run(t, testenv.Tool(t, "cryptsetup"), "reencrypt", "--encrypt", "--type", "luks2", "--cipher", v.cipher,
		"--key-size", itoa(v.keyBits), "--sector-size", itoa(v.sectorSize), "--pbkdf", "pbkdf2",
		"--pbkdf-force-iterations", "1000", "--reduce-device-size", "16M", "--resilience", "none",
		"--force-offline-reencrypt", "--disable-locks", "-q", "--key-file", key, image)
}

// luks1 lets cryptsetup make the header and QEMU write the data. (A header of QEMU's own begins with a measurement of the
// processor, which fails now and then on a busy machine.)
func luks1(t *testing.T, v *volume, plain, key, image string) {
	t.Helper()
	sparse(t, image, 2<<20+16<<20)
	testenv.Run(t, testenv.Tool(t, "cryptsetup"), "luksFormat", "--type", "luks1", "--cipher", v.cipher, "--key-size",
		itoa(v.keyBits), "--hash", "sha256", "--pbkdf-force-iterations", "1000", "--disable-locks", "-q", "--key-file", key, image)
	testenv.Run(t, testenv.Tool(t, "qemu-img"), "convert", "-n", "-f", "raw", "--object", "secret,id=k,file="+key,
		"--target-image-opts", plain, "driver=luks,key-secret=k,file.filename="+image)
}

// decryptLUKS1 lets QEMU read the volume, as a second opinion on what dm-crypt wrote.
func decryptLUKS1(t *testing.T, key, image, plain string) {
	t.Helper()
	testenv.Run(t, testenv.Tool(t, "qemu-img"), "convert", "--object", "secret,id=k,file="+key, "--image-opts", "-O", "raw",
		"driver=luks,key-secret=k,file.filename="+image, plain)
}

// readExt4 takes a file out of an ext4 without mounting it, after checking the file system.
func readExt4(t *testing.T, device, name string) []byte {
	t.Helper()
	testenv.Run(t, testenv.Tool(t, "e2fsck"), "-f", "-n", device)
	out := filepath.Join(t.TempDir(), name)
	testenv.Run(t, testenv.Tool(t, "debugfs"), "-R", "dump /"+name+" "+out, device)
	data, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func writeExt4(t *testing.T, device, name string, data []byte) {
	t.Helper()
	in := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(in, data, 0o600); err != nil {
		t.Fatal(err)
	}
	testenv.Run(t, testenv.Tool(t, "debugfs"), "-w", "-R", "write "+in+" "+name, device)
}

func wantContent(t *testing.T, got []byte, v *volume, file string) {
	t.Helper()
	if !bytes.Equal(got, content(v.name, file)) {
		t.Errorf("%s of %s is not what was written: %d bytes", file, v.name, len(got))
	}
}

func sparse(t *testing.T, path string, size int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func grow(t *testing.T, path string, by int64) {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, st.Size()+by); err != nil {
		t.Fatal(err)
	}
}
