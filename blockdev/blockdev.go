// Package blockdev is the one door to disks: it opens a device exclusively, reads its LUKS header or takes plain-mode
// parameters, turns a key into the volume key and exports the plaintext through dm-crypt or FUSE. It gets keys as
// arguments and knows neither key services nor the daemon.
package blockdev

import (
	"fmt"
	"path/filepath"
	"regexp"
	"slices"

	"voldek/blockdev/dm"
	"voldek/internal/exit"
)

// The errors of this room. Those of luks, dm and fusedev pass through with their own codes.
var (
	ErrNoDevice     = exit.New(exit.NoDevice, "no such device")
	ErrBusy         = exit.New(exit.Busy, "the device is in use")
	ErrNoBackend    = exit.New(exit.NoBackend, "neither dm-crypt nor FUSE can export the volume here")
	ErrUsage        = exit.New(exit.Usage, "wrong volume parameters")
	ErrShortKey     = exit.New(exit.WrongKey, "the key is shorter than the volume key")
	errKernelCipher = exit.New(exit.NoBackend, "needs dm-crypt (via kernel)")
	errNotAllowed   = exit.New(exit.NotAllowed, "permission denied")
)

// Via says which backend exports a volume.
type Via string

// Auto takes the kernel where it has dm-crypt, and FUSE elsewhere.
const (
	Auto   Via = "auto"
	Kernel Via = "kernel"
	FUSE   Via = "fuse"
)

// The volume types.
const (
	TypeLUKS  = "luks"
	TypePlain = "plain"
)

// Spec says what to open and how. The zero value of a field is its default; Check fills those in.
type Spec struct {
	Name     string `json:"name" toml:"name"`                               // [A-Za-z0-9_.-]{1,64}
	Device   string `json:"device" toml:"device"`                           // block device or image file, absolute path
	Header   string `json:"header,omitempty" toml:"header,omitempty"`       // detached LUKS header, absolute path
	Type     string `json:"type,omitempty" toml:"type,omitempty"`           // TypeLUKS or TypePlain
	Via      Via    `json:"via,omitempty" toml:"via,omitempty"`             // backend
	ReadOnly bool   `json:"read_only,omitempty" toml:"read_only,omitempty"` // no write reaches the device

	// Plain mode only; a LUKS header says all this itself.
	Cipher     string `json:"cipher,omitempty" toml:"cipher,omitempty"`           // aes-xts-plain64 or aes-xts-plain
	KeySize    int    `json:"key_size,omitempty" toml:"key_size,omitempty"`       // bits: 256 or 512
	Hash       string `json:"hash,omitempty" toml:"hash,omitempty"`               // how the key becomes the volume key
	Offset     uint64 `json:"offset,omitempty" toml:"offset,omitempty"`           // start of the data, 512-byte sectors
	Skip       uint64 `json:"skip,omitempty" toml:"skip,omitempty"`               // added to the IV, 512-byte sectors
	SectorSize int    `json:"sector_size,omitempty" toml:"sector_size,omitempty"` // encryption sector, bytes

	// AllowDiscards lets discards through to the device, with either backend. The rest is dm-crypt's own, see
	// Documentation/admin-guide/device-mapper/dm-crypt.rst.
	AllowDiscards       bool `json:"allow_discards,omitempty" toml:"allow_discards,omitempty"`
	NoReadWorkqueue     bool `json:"no_read_workqueue,omitempty" toml:"no_read_workqueue,omitempty"`
	NoWriteWorkqueue    bool `json:"no_write_workqueue,omitempty" toml:"no_write_workqueue,omitempty"`
	SameCPUCrypt        bool `json:"same_cpu_crypt,omitempty" toml:"same_cpu_crypt,omitempty"`
	SubmitFromCryptCPUs bool `json:"submit_from_crypt_cpus,omitempty" toml:"submit_from_crypt_cpus,omitempty"`
}

var nameForm = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,64}$`)

// CheckName reports whether name may name a volume: it becomes a file name and a device-mapper name.
func CheckName(name string) error {
	if !nameForm.MatchString(name) || name == "." || name == ".." {
		return fmt.Errorf("%w: name %q: want 1 to 64 of A-Z a-z 0-9 _ . -", ErrUsage, name)
	}
	return nil
}

// Check fills in defaults and returns an ErrUsage that names the first wrong field.
func (s *Spec) Check() error {
	if err := CheckName(s.Name); err != nil {
		return err
	}
	for _, p := range []struct{ field, path string }{{"device", s.Device}, {"header", s.Header}} {
		if p.path != "" && !filepath.IsAbs(p.path) {
			return fmt.Errorf("%w: %s %q: want an absolute path", ErrUsage, p.field, p.path)
		}
	}
	if s.Device == "" {
		return fmt.Errorf("%w: device is missing", ErrUsage)
	}
	if s.Via == "" {
		s.Via = Auto
	}
	if !slices.Contains([]Via{Auto, Kernel, FUSE}, s.Via) {
		return fmt.Errorf("%w: via %q: want auto, kernel or fuse", ErrUsage, s.Via)
	}
	switch s.Type {
	case "", TypeLUKS:
		s.Type = TypeLUKS
		return s.checkLUKS()
	case TypePlain:
		return s.checkPlain()
	}
	return fmt.Errorf("%w: type %q: want luks or plain", ErrUsage, s.Type)
}

// checkLUKS refuses plain-mode fields: the header decides, and a field that silently does nothing misleads.
func (s *Spec) checkLUKS() error {
	if s.Cipher != "" || s.KeySize != 0 || s.Hash != "" || s.Offset != 0 || s.Skip != 0 || s.SectorSize != 0 {
		return fmt.Errorf("%w: cipher, key_size, hash, offset, skip and sector_size belong to type plain", ErrUsage)
	}
	return nil
}

// checkPlain asks for a hash by name: cryptsetup's default changed in 2.7, and nothing on the disk shows a wrong choice.
func (s *Spec) checkPlain() error {
	if s.Cipher == "" {
		s.Cipher = "aes-xts-plain64"
	}
	if s.KeySize == 0 {
		s.KeySize = 512
	}
	if s.SectorSize == 0 {
		s.SectorSize = 512
	}
	switch {
	case s.Header != "":
		return fmt.Errorf("%w: header: a plain volume has none", ErrUsage)
	case s.Cipher != "aes-xts-plain64" && s.Cipher != "aes-xts-plain":
		return fmt.Errorf("%w: cipher %q: want aes-xts-plain64 or aes-xts-plain", ErrUsage, s.Cipher)
	case s.KeySize != 256 && s.KeySize != 512:
		return fmt.Errorf("%w: key_size %d: want 256 or 512 bits", ErrUsage, s.KeySize)
	case s.Hash == "":
		return fmt.Errorf("%w: hash is missing: want ripemd160 (cryptsetup up to 2.6), sha256 (from 2.7) or plain", ErrUsage)
	case s.Hash != "plain" && plainHashes[s.Hash] == nil:
		return fmt.Errorf("%w: hash %q: want plain, sha256 or ripemd160", ErrUsage, s.Hash)
	case !slices.Contains([]int{512, 1024, 2048, 4096}, s.SectorSize):
		return fmt.Errorf("%w: sector_size %d: want 512, 1024, 2048 or 4096", ErrUsage, s.SectorSize)
	case s.Offset > maxSectors || s.Skip > maxSectors:
		return fmt.Errorf("%w: offset and skip: at most %d sectors", ErrUsage, uint64(maxSectors))
	}
	return nil
}

// maxSectors keeps every offset in bytes inside an int64.
const maxSectors = 1 << 53

func (s *Spec) kernelOptions() dm.Options {
	return dm.Options{
		AllowDiscards:       s.AllowDiscards,
		NoReadWorkqueue:     s.NoReadWorkqueue,
		NoWriteWorkqueue:    s.NoWriteWorkqueue,
		SameCPUCrypt:        s.SameCPUCrypt,
		SubmitFromCryptCPUs: s.SubmitFromCryptCPUs,
	}
}
