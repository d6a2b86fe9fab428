package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"voldek/daemon/api"
	"voldek/daemon/client"
	"voldek/internal/cli"
	"voldek/internal/exit"
)

func listCommand(c *command) *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Short:   "Show the volumes the daemon knows",
		Example: `  voldek list --json`,
		Args:    exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			volumes, err := client.New(c.socket).List(cmd.Context())
			if err != nil {
				return err
			}
			if c.json {
				return cli.PrintJSON(os.Stdout, api.Volumes{Version: api.Version, Volumes: volumes})
			}
			return printVolumes(os.Stdout, volumes)
		},
	}
}

func printVolumes(w io.Writer, volumes []api.Volume) error {
	var rows [][]string
	for _, v := range volumes {
		since := cli.Since(v.Since, time.Now(), cli.IsTerminal(w))
		rows = append(rows, []string{v.Name, v.Device, v.Export, string(v.Via), string(v.State), since})
	}
	return cli.PrintTable(w, []string{"NAME", "DEVICE", "EXPORT", "VIA", "STATE", "SINCE"}, rows)
}

func statusCommand(c *command) *cobra.Command {
	return &cobra.Command{
		Use:     "status NAME",
		Short:   "Show one volume: where it is open, how it was unlocked, how long each step took",
		Example: `  voldek status pg-data`,
		Args:    exactArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			volume, err := client.New(c.socket).Status(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if c.json {
				err = cli.PrintJSON(os.Stdout, api.Answer{Version: api.Version, Volume: volume})
			} else {
				err = printStatus(os.Stdout, volume)
			}
			if err == nil && volume.State != api.Open {
				err = fmt.Errorf("%s: %w: %s", args[0], errNotOpen, volume.State)
			}
			return err
		},
	}
}

// errNotOpen lets a script ask with status alone whether it may go on.
var errNotOpen = exit.New(exit.NoDevice, "the volume is not open")

func printStatus(w io.Writer, v *api.Volume) error {
	lines := []struct{ name, value string }{
		{"name", v.Name},
		{"state", string(v.State)},
		{"since", cli.Since(v.Since, time.Now(), cli.IsTerminal(w))},
		{"device", v.Device},
		{"header", v.Header},
		{"export", v.Export},
		{"via", string(v.Via)},
		{"type", v.Type},
		{"uuid", v.UUID},
		{"cipher", v.Cipher},
		{"key size", numberOf(int64(v.KeyBits), "bits")},
		{"sector size", numberOf(int64(v.SectorSize), "bytes")},
		{"size", sizeOf(v.Size)},
		{"mode", mode(v)},
		{"key", v.Key},
	}
	if v.Keyslot != nil {
		lines = append(lines, struct{ name, value string }{"key slot", fmt.Sprint(*v.Keyslot)})
	}
	if s := v.Steps; s != nil {
		lines = append(lines, struct{ name, value string }{"steps", fmt.Sprintf(
			"header %.1f ms, fetch %.1f ms, key slot %.1f ms, export %.1f ms, total %.1f ms",
			s.Header*1e3, s.Fetch*1e3, s.Keyslot*1e3, s.Export*1e3, s.Total*1e3)})
	}
	if v.Error != nil {
		lines = append(lines, struct{ name, value string }{"error", v.Error.Message})
	}
	var out strings.Builder
	for _, line := range lines {
		if line.value != "" {
			fmt.Fprintf(&out, "%-12s %s\n", line.name+":", line.value)
		}
	}
	_, err := io.WriteString(w, out.String())
	return err
}

func numberOf(n int64, unit string) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprintf("%d %s", n, unit)
}

func sizeOf(n int64) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprintf("%s (%d bytes)", cli.Size(n), n)
}

func mode(v *api.Volume) string {
	switch {
	case v.State != api.Open:
		return ""
	case v.ReadOnly:
		return "read-only"
	}
	return "read/write"
}
