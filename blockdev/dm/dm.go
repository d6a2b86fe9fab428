// Package dm makes, finds and removes dm-crypt mappings through the kernel's device-mapper ioctls, with the volume key
// handed over in the kernel keyring and never in the table. It does not know LUKS headers, where keys come from, or who
// uses a mapping.
package dm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
	"voldek/internal/exit"
)

// The errors that callers tell apart. All else is the kernel's own error (a unix.Errno along the chain).
var (
	ErrUnavailable = exit.New(exit.NoBackend, "dm-crypt is not available")
	ErrBusy        = exit.New(exit.Busy, "in use")
	ErrNotFound    = exit.New(exit.NoDevice, "no such mapping")
)

// Crypt describes one dm-crypt mapping. The backing device must not be held with O_EXCL by the caller: dm-crypt makes its
// own exclusive claim.
type Crypt struct {
	Name           string // [A-Za-z0-9_.-]{1,64}; the export is /dev/mapper/Name
	UUID           string // the device-mapper UUID, see UUID
	Device         string // backing block device, "major:minor"
	Cipher         string // as in the table: "aes-xts-plain64", "aes-cbc-essiv:sha256"
	KeyDescription string // of the logon key, "cryptsetup:UUID-d0"; empty in an Info whose table holds no keyring key
	SectorSize     int    // bytes: 512, 1024, 2048 or 4096
	IVOffset       uint64 // added to the sector number of the IV, in 512-byte sectors
	Offset         uint64 // where the encrypted data begins on Device, in 512-byte sectors
	Sectors        uint64 // length, in 512-byte sectors
	ReadOnly       bool
	Options        Options
}

// Options are the optional parameters of dm-crypt that a volume may ask for.
type Options struct {
	AllowDiscards       bool
	SameCPUCrypt        bool
	SubmitFromCryptCPUs bool
	NoReadWorkqueue     bool // Linux 5.9
	NoWriteWorkqueue    bool // Linux 5.9
}

// Info is what the kernel says of a mapping. The fields of the table (Device, Cipher, KeyDescription, SectorSize, IVOffset,
// Offset, Options, Other) are set only where Target is "crypt". A key in the table is never shown, nor kept.
type Info struct {
	Crypt
	Path         string // /dev/mapper/Name
	Major, Minor uint32 // of the mapping itself
	OpenCount    int    // openers and mounts
	Active       bool   // it has a live table
	Target       string // the type of its target; empty without a live table and where there are several
	Other        []string
}

// same reports whether an existing mapping gives the bytes that want asks for. Options that only tell how the work is
// scheduled may differ.
func (i *Info) same(want *Crypt) bool {
	return i.Target == "crypt" && len(i.Other) == 0 && i.UUID == want.UUID && i.Device == want.Device &&
		i.Cipher == want.Cipher && i.SectorSize == want.SectorSize && i.IVOffset == want.IVOffset &&
		i.Offset == want.Offset && i.Sectors == want.Sectors && i.ReadOnly == want.ReadOnly
}

// UUID returns the device-mapper UUID by which cryptsetup knows its mappings. kind is LUKS1, LUKS2 or PLAIN; luksUUID is
// empty for PLAIN.
func UUID(kind, luksUUID, name string) string {
	if luksUUID == "" {
		return "CRYPT-" + kind + "-" + name
	}
	return "CRYPT-" + kind + "-" + strings.ReplaceAll(luksUUID, "-", "") + "-" + name
}

// making is held while a mapping has no live table yet, so that no other goroutine takes it for a leftover.
var making sync.Mutex

// Create makes the mapping and returns its path, which exists when Create returns. A mapping of that name with the same
// UUID, backing device, range, cipher, sector size and access is left as it is and its path returned; any other is
// ErrBusy, as is a backing device that somebody else holds. key is the volume key, which stays the caller's; the kernel has
// its own copy afterwards and the keyring has none. When Create fails, nothing of what it made remains. Safe for
// concurrent use.
func Create(ctx context.Context, c Crypt, key []byte) (path string, err error) {
	ctl, err := openControl()
	if err != nil {
		return "", err
	}
	defer ctl.close()
	return ctl.create(ctx, &c, key)
}

func (ctl *control) create(ctx context.Context, c *Crypt, key []byte) (path string, err error) {
	if err := c.check(len(key)); err != nil {
		return "", err
	}
	if err := ctx.Err(); err != nil {
		return "", err
	}
	dev, made, err := ctl.assemble(c, key)
	if err != nil {
		return "", err
	}
	if err := publish(ctx, c.Name, dev); err != nil {
		if made {
			err = ctl.undo(c.Name, err)
		}
		return "", err
	}
	return nodePath(c.Name), nil
}

// assemble returns the device number of the mapping, and whether it was made now.
func (ctl *control) assemble(c *Crypt, key []byte) (dev uint64, made bool, err error) {
	making.Lock()
	defer making.Unlock()
	dev, err = ctl.deviceCreate(c)
	if errors.Is(err, unix.EBUSY) {
		dev, err = ctl.adopt(c)
		if err != nil || dev != 0 {
			return dev, false, err
		}
		dev, err = ctl.deviceCreate(c)
	}
	if err != nil {
		return 0, false, fmt.Errorf("create mapping %s: %w", c.Name, err)
	}
	err = c.checkHolders()
	if err == nil {
		err = withKey(c.KeyDescription, key, func() error { return ctl.tableLoad(c, len(key)) })
	}
	if err == nil {
		err = ctl.resume(c.Name)
	}
	if err != nil {
		return 0, false, ctl.undo(c.Name, err)
	}
	return dev, true, nil
}

// adopt looks at the mapping that has c's name already: its device number where it is the same volume; 0 where it was a
// leftover of an interrupted creation, which is removed; else ErrBusy.
func (ctl *control) adopt(c *Crypt) (dev uint64, err error) {
	info, err := ctl.lookup(c.Name)
	if errors.Is(err, ErrNotFound) {
		return 0, nil // gone in the meantime, or another name has our UUID: the second try tells
	}
	if err != nil {
		return 0, err
	}
	if info.same(c) {
		return unix.Mkdev(info.Major, info.Minor), nil
	}
	if info.UUID != c.UUID || info.Active || info.OpenCount > 0 {
		return 0, fmt.Errorf("mapping %s: %w: it is another volume or has another table", c.Name, ErrBusy)
	}
	return 0, ctl.deviceRemove(c.Name)
}

// checkHolders refuses a backing device that another mapping is on. The kernel would not: its exclusive claim is one for
// all of device-mapper, and two mappings of one volume destroy each other's data. A table that another process loads
// between this look and ours is not seen. Without sysfs there is nothing to look at.
func (c *Crypt) checkHolders() error {
	holders, err := os.ReadDir("/sys/dev/block/" + c.Device + "/holders")
	if err != nil || len(holders) == 0 {
		return nil
	}
	return fmt.Errorf("mapping %s: device %s is %w by %s", c.Name, c.Device, ErrBusy, holders[0].Name())
}

// undo removes the mapping after err.
func (ctl *control) undo(name string, err error) error {
	if removing := ctl.deviceRemove(name); removing != nil {
		return fmt.Errorf("%w; and mapping %s stays, half made: %w", err, name, removing)
	}
	unpublish(context.Background(), name)
	return err
}

// Lookup returns the mapping by that name, whatever its target. ErrNotFound where there is none.
func Lookup(name string) (*Info, error) {
	ctl, err := openControl()
	if err != nil {
		return nil, err
	}
	defer ctl.close()
	return ctl.lookup(name)
}

// List returns all dm-crypt mappings of this host, whoever made them, in the kernel's order.
func List() ([]Info, error) {
	ctl, err := openControl()
	if err != nil {
		return nil, err
	}
	defer ctl.close()
	names, err := ctl.names()
	if err != nil {
		return nil, err
	}
	var list []Info
	for _, name := range names {
		info, err := ctl.lookup(name)
		if errors.Is(err, ErrNotFound) {
			continue // removed since the names were read
		}
		if err != nil {
			return nil, err
		}
		if info.Target == "crypt" {
			list = append(list, *info)
		}
	}
	return list, nil
}

// Available returns nil where dm-crypt can be used by this process, else ErrUnavailable with the reason. It makes the
// kernel load the dm-crypt module.
func Available() error {
	ctl, err := openControl()
	if err != nil {
		return err
	}
	defer ctl.close()
	return ctl.cryptTarget()
}

var (
	nameForm   = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,64}$`)
	uuidForm   = regexp.MustCompile(`^CRYPT-[A-Za-z0-9_.-]{1,122}$`)
	deviceForm = regexp.MustCompile(`^[0-9]{1,4}:[0-9]{1,7}$`)
	cipherForm = regexp.MustCompile(`^[a-z0-9]+-[a-z0-9]+-[a-z0-9]+(:[a-z0-9]+)?$`)
	keyForm    = regexp.MustCompile(`^[A-Za-z0-9_.-]+:[A-Za-z0-9_.:-]+$`) // the kernel wants a prefix before the colon
)

// checkName refuses what is not one plain file name in /dev/mapper of our own alphabet.
func checkName(name string) error {
	if !nameForm.MatchString(name) || name == "." || name == ".." || name == unix.DM_CONTROL_NODE {
		return fmt.Errorf("mapping name %q is not allowed", name)
	}
	return nil
}

// check keeps every string of c a single field of the table. Which ciphers are acceptable is decided where headers are
// validated.
func (c *Crypt) check(keySize int) error {
	if err := checkName(c.Name); err != nil {
		return err
	}
	switch {
	case !uuidForm.MatchString(c.UUID):
		return fmt.Errorf("mapping %s: uuid %q is not allowed", c.Name, c.UUID)
	case !deviceForm.MatchString(c.Device):
		return fmt.Errorf("mapping %s: device %q is not major:minor", c.Name, c.Device)
	case !cipherForm.MatchString(c.Cipher):
		return fmt.Errorf("mapping %s: cipher %q is not allowed", c.Name, c.Cipher)
	case !keyForm.MatchString(c.KeyDescription):
		return fmt.Errorf("mapping %s: key description %q is not allowed", c.Name, c.KeyDescription)
	case c.SectorSize != 512 && c.SectorSize != 1024 && c.SectorSize != 2048 && c.SectorSize != 4096:
		return fmt.Errorf("mapping %s: sector size %d is not allowed", c.Name, c.SectorSize)
	case c.Sectors == 0 || c.Sectors%uint64(c.SectorSize/512) != 0:
		return fmt.Errorf("mapping %s: %d sectors are no multiple of the sector size %d", c.Name, c.Sectors, c.SectorSize)
	case keySize < 16 || keySize > 64:
		return fmt.Errorf("mapping %s: key of %d bytes", c.Name, keySize)
	}
	return nil
}
