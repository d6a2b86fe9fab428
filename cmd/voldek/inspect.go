package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"voldek/blockdev"
	"voldek/blockdev/luks"
	"voldek/daemon/api"
	"voldek/internal/cli"
)

// inspectLimits lets a header be looked at that asks for more memory than this host would give to open it.
var inspectLimits = luks.Limits{Argon2Memory: 4 << 30}

func inspectCommand(c *command) *cobra.Command {
	var header string
	command := &cobra.Command{
		Use:   "inspect DEVICE",
		Short: "Show a LUKS header: cipher, key slots, tokens",
		Long: `Reads and validates the LUKS header of DEVICE and shows what it says. It needs no key and no daemon, and on an image file
no root. A header that is not on the list of what voldek opens is refused with exit code 17 and the name of the field.`,
		Example: `  voldek inspect /dev/vdb
  voldek inspect disk.img --header disk.hdr --json`,
		Args: exactArgs("DEVICE"),
		RunE: func(_ *cobra.Command, args []string) error {
			c.about.Device = args[0]
			h, err := blockdev.Inspect(args[0], header, inspectLimits)
			if err != nil {
				return err
			}
			if c.json {
				return cli.PrintJSON(os.Stdout, struct {
					Version int          `json:"version"`
					Device  string       `json:"device"`
					Header  *luks.Header `json:"header"`
				}{api.Version, args[0], h})
			}
			return printHeader(os.Stdout, args[0], h)
		},
	}
	command.Flags().StringVar(&header, "header", "", "detached LUKS header")
	return command
}

func printHeader(w io.Writer, device string, h *luks.Header) error {
	var out strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&out, "%-12s %s\n", name+":", fmt.Sprintf(format, args...))
	}
	line("device", "%s", device)
	line("type", "luks%d", h.Version)
	line("uuid", "%s", h.UUID)
	if h.Label != "" {
		line("label", "%s", h.Label)
	}
	if h.Subsystem != "" {
		line("subsystem", "%s", h.Subsystem)
	}
	if h.Version == 2 {
		line("sequence", "%d, from the %s header", h.SequenceID, h.Copy)
	}
	if h.Damaged != "" {
		line("damaged", "%s", h.Damaged)
	}
	line("header", "%s with key slots", cli.Size(h.MetadataSize))
	s := h.Segment
	line("cipher", "%s, %d bit key", s.Cipher, s.KeySize*8)
	line("data", "offset %s, %s, %d-byte sectors", cli.Size(s.Offset), cli.Size(s.Length), s.SectorSize)
	if s.IVTweak != 0 {
		line("iv tweak", "%d sectors", s.IVTweak)
	}
	if len(h.Flags) > 0 {
		line("flags", "%s", strings.Join(h.Flags, " "))
	}
	var rows [][]string
	for _, k := range h.Keyslots {
		rows = append(rows, []string{fmt.Sprint(k.ID), slotState(k), k.Priority, kdf(k.KDF), k.AreaCipher, k.AFHash})
	}
	out.WriteString("\n")
	if err := cli.PrintTable(&out, []string{"SLOT", "KEY", "PRIORITY", "KDF", "AREA", "AF"}, rows); err != nil {
		return err
	}
	if len(h.Tokens) > 0 {
		rows = nil
		for _, t := range h.Tokens {
			rows = append(rows, []string{fmt.Sprint(t.ID), t.Type, strings.Trim(fmt.Sprint(t.Keyslots), "[]")})
		}
		out.WriteString("\n")
		if err := cli.PrintTable(&out, []string{"TOKEN", "TYPE", "SLOTS"}, rows); err != nil {
			return err
		}
	}
	_, err := io.WriteString(w, printable(out.String()))
	return err
}

// printable keeps what a hostile label or token type could do to a terminal away from it.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r != '\n' && (r < ' ' || r == 0x7f || (r >= 0x80 && r < 0xa0)) {
			return '?'
		}
		return r
	}, s)
}

func slotState(k luks.Keyslot) string {
	if !k.Bound {
		return "unbound"
	}
	return fmt.Sprintf("%d bits", k.KeySize*8)
}

func kdf(k luks.KDF) string {
	if k.Type == "pbkdf2" {
		return fmt.Sprintf("pbkdf2-%s, %d iterations", k.Hash, k.Iterations)
	}
	return fmt.Sprintf("%s, %d passes, %s, %d lanes", k.Type, k.Time, cli.Size(int64(k.MemoryKiB)<<10), k.CPUs)
}
