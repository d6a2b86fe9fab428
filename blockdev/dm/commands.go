package dm

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// deviceCreate makes a mapping without a table. unix.EBUSY: the name or the UUID is taken.
func (ctl *control) deviceCreate(c *Crypt) (dev uint64, err error) {
	answer, err := ctl.do(unix.DM_DEV_CREATE, request{name: c.Name, uuid: c.UUID})
	return answer.Dev, err
}

// tableLoad gives the mapping its table, which is not live before resume. The key is in the keyring of this thread.
func (ctl *control) tableLoad(c *Crypt, keySize int) error {
	line := target{sectors: c.Sectors, kind: "crypt", params: c.table(keySize)}
	r := request{name: c.Name, targets: 1, payload: line.encode()}
	if c.ReadOnly {
		r.flags = unix.DM_READONLY_FLAG
	}
	_, err := ctl.do(unix.DM_TABLE_LOAD, r)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("mapping %s: device %s is %w", c.Name, c.Device, ErrBusy)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EROFS):
		return fmt.Errorf("mapping %s: device %s is read-only: %w", c.Name, c.Device, err)
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("mapping %s: this kernel has no cipher %s: %w", c.Name, c.Cipher, err)
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("mapping %s: the kernel refuses the table, its log says why: %w", c.Name, err)
	case errors.Is(err, ErrNotFound): // ENXIO: the mapping exists, so it is the backing device that does not
		return fmt.Errorf("mapping %s: device %s: %w", c.Name, c.Device, unix.ENXIO)
	}
	return fmt.Errorf("load the table of mapping %s: %w", c.Name, err)
}

// resume makes the loaded table live and the device appear in udev.
func (ctl *control) resume(name string) error {
	if _, err := ctl.do(unix.DM_DEV_SUSPEND, request{name: name, event: udevPrimary}); err != nil {
		return fmt.Errorf("activate mapping %s: %w", name, err)
	}
	return nil
}

func (ctl *control) deviceRemove(name string) error {
	_, err := ctl.do(unix.DM_DEV_REMOVE, request{name: name, event: udevPrimary})
	return err
}

// names returns the names of all mappings.
func (ctl *control) names() ([]string, error) {
	answer, err := ctl.do(unix.DM_LIST_DEVICES, request{})
	if err != nil {
		return nil, fmt.Errorf("list mappings: %w", err)
	}
	return decodeNames(answer.payload)
}

func (ctl *control) lookup(name string) (*Info, error) {
	if err := checkLookup(name); err != nil {
		return nil, err
	}
	answer, err := ctl.do(unix.DM_TABLE_STATUS, request{name: name, flags: unix.DM_STATUS_TABLE_FLAG})
	if err != nil {
		return nil, fmt.Errorf("mapping %s: %w", name, err)
	}
	defer answer.wipe()
	info := &Info{
		Crypt: Crypt{
			Name:     cString(answer.Name[:]),
			UUID:     cString(answer.Uuid[:]),
			ReadOnly: answer.Flags&unix.DM_READONLY_FLAG != 0,
		},
		Path:      nodePath(name),
		Major:     unix.Major(answer.Dev),
		Minor:     unix.Minor(answer.Dev),
		OpenCount: int(answer.Open_count),
		Active:    answer.Flags&unix.DM_ACTIVE_PRESENT_FLAG != 0,
	}
	if answer.Target_count != 1 {
		return info, nil
	}
	line, err := decodeTarget(answer.payload)
	if err != nil {
		return nil, fmt.Errorf("mapping %s: %w", name, err)
	}
	info.Target, info.Sectors = line.kind, line.sectors
	if line.kind != "crypt" {
		return info, nil
	}
	if err := info.parseTable(line.params); err != nil {
		return nil, fmt.Errorf("mapping %s: %w", name, err)
	}
	return info, nil
}

// checkLookup keeps a name from being longer than the kernel's field. Other people's mappings may have names that we would
// not give.
func checkLookup(name string) error {
	if name == "" || len(name) >= unix.DM_NAME_LEN {
		return fmt.Errorf("mapping %q: %w", name, ErrNotFound)
	}
	return nil
}

// cryptTarget makes the kernel load dm-crypt and looks at its version: keys in the keyring came with 1.15.0, and 1.18.1 is
// the first that cryptsetup trusts with them (Linux 4.15).
func (ctl *control) cryptTarget() error {
	answer, err := ctl.do(unix.DM_GET_TARGET_VERSION, request{name: "crypt"})
	if errors.Is(err, unix.ENOTTY) {
		return nil // before Linux 5.4; loading the table will tell
	}
	if err != nil {
		return fmt.Errorf("%w: the kernel has no crypt target: %w", ErrUnavailable, err)
	}
	version, err := decodeVersion(answer.payload)
	if err != nil {
		return err
	}
	if version[0] == 1 && (version[1] < 18 || version[1] == 18 && version[2] < 1) {
		return fmt.Errorf("%w: the kernel's crypt target %d.%d.%d takes no keys from the keyring", ErrUnavailable,
			version[0], version[1], version[2])
	}
	return nil
}
