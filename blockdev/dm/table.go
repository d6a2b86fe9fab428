package dm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// optionWord couples an option with its word in the table.
type optionWord struct {
	word string
	set  *bool
}

// flags returns all options in the order in which the kernel prints them.
func (o *Options) flags() []optionWord {
	return []optionWord{
		{"allow_discards", &o.AllowDiscards},
		{"same_cpu_crypt", &o.SameCPUCrypt},
		{"submit_from_crypt_cpus", &o.SubmitFromCryptCPUs},
		{"no_read_workqueue", &o.NoReadWorkqueue},
		{"no_write_workqueue", &o.NoWriteWorkqueue},
	}
}

// table returns the parameters of the crypt target, as in the kernel's admin-guide/device-mapper/dm-crypt.rst:
// cipher, key, IV offset, device, offset, and the number of options with the options themselves.
func (c *Crypt) table(keySize int) []byte {
	var options []string
	for _, flag := range c.Options.flags() {
		if *flag.set {
			options = append(options, flag.word)
		}
	}
	if c.SectorSize != 512 {
		options = append(options, fmt.Sprintf("sector_size:%d", c.SectorSize))
	}
	line := fmt.Sprintf("%s :%d:logon:%s %d %s %d", c.Cipher, keySize, c.KeyDescription, c.IVOffset, c.Device, c.Offset)
	if len(options) > 0 {
		line += fmt.Sprintf(" %d %s", len(options), strings.Join(options, " "))
	}
	return []byte(line)
}

// parseTable fills i from the parameters of a crypt target. The key field is passed over without a copy.
func (i *Info) parseTable(params []byte) error {
	fields := bytes.Fields(params)
	if len(fields) < 5 {
		return fmt.Errorf("crypt table of %d fields", len(fields))
	}
	i.Cipher = string(fields[0])
	i.KeyDescription = keyDescription(fields[1])
	i.Device = string(fields[3])
	i.SectorSize = 512
	var err error
	if i.IVOffset, err = strconv.ParseUint(string(fields[2]), 10, 64); err != nil {
		return fmt.Errorf("iv offset of a crypt table: %w", err)
	}
	if i.Offset, err = strconv.ParseUint(string(fields[4]), 10, 64); err != nil {
		return fmt.Errorf("offset of a crypt table: %w", err)
	}
	if len(fields) == 5 {
		return nil
	}
	return i.parseOptions(fields[5:])
}

func (i *Info) parseOptions(fields [][]byte) error {
	if count, err := strconv.Atoi(string(fields[0])); err != nil || count != len(fields)-1 {
		return fmt.Errorf("crypt table counts %.20q options and has %d", fields[0], len(fields)-1)
	}
	flags := i.Options.flags()
next:
	for _, field := range fields[1:] {
		word := string(field)
		for _, flag := range flags {
			if word == flag.word {
				*flag.set = true
				continue next
			}
		}
		if size, ok := strings.CutPrefix(word, "sector_size:"); ok {
			bytes, err := strconv.Atoi(size)
			if err != nil {
				return fmt.Errorf("sector size of a crypt table: %w", err)
			}
			i.SectorSize = bytes
			continue
		}
		i.Other = append(i.Other, word)
	}
	return nil
}

// keyDescription returns the description in a key field ":64:logon:DESCRIPTION", and "" for a key in hex.
func keyDescription(field []byte) string {
	if len(field) == 0 || field[0] != ':' {
		return ""
	}
	parts := strings.SplitN(string(field), ":", 4) // no key in here: the kernel writes one only as hex
	if len(parts) < 4 {
		return ""
	}
	return parts[3]
}

// decodeVersion reads struct dm_target_versions: {next u32, version [3]u32, name}.
func decodeVersion(payload []byte) (version [3]uint32, err error) {
	if len(payload) < 16 {
		return version, errors.New("target version of device-mapper: cut short")
	}
	_, err = binary.Decode(payload[4:], binary.NativeEndian, &version)
	return version, err
}
