package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"voldek/blockdev"
	"voldek/daemon/api"
	"voldek/internal/cli"
)

func exportCommand(c *command) *cobra.Command {
	var spec blockdev.Spec
	var keys keySource
	command := &cobra.Command{
		Use:   "export DEVICE DIR --key REF",
		Short: "Export a volume as the file DIR/volume through FUSE, in the foreground and without the daemon",
		Long: `Opens DEVICE in this process and serves its plaintext as the file "volume" in the empty directory DIR until it is
unmounted or interrupted. On an image file it needs no root, only fusermount3.`,
		Example: `  voldek export disk.img ./mnt --key file:disk.key
  voldek export /dev/vdb /mnt/vdb --key barbican:6c9a2f0e-1111-4222-8333-444455556666 --read-only`,
		Args: exactArgs("DEVICE", "DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := c.complete(&spec, args[0]); err != nil {
				return err
			}
			dir, err := filepath.Abs(args[1])
			if err != nil {
				return err
			}
			return c.export(cmd.Context(), spec, keys, dir)
		},
	}
	flags := command.Flags()
	keys.addFlags(flags)
	specFlags(flags, &spec, "offset")
	flags.BoolVar(&spec.ReadOnly, "read-only", false, "never write to DEVICE")
	flags.BoolVar(&spec.AllowDiscards, "allow-discards", false, "pass discards on; they show which sectors are unused")
	return command
}

func (c *command) export(ctx context.Context, spec blockdev.Spec, keys keySource, dir string) error {
	u, err := c.open(ctx, spec, keys)
	if err != nil {
		return err
	}
	export, err := u.device.MountFUSE(u.volumeKey, dir)
	u.volumeKey.Wipe()
	if err != nil {
		return err
	}
	segment := u.device.Segment()
	if c.json {
		err = cli.PrintJSON(os.Stdout, api.Answer{Version: api.Version, Volume: &api.Volume{
			Name: spec.Name, Device: spec.Device, Export: export.Path(), Via: export.Via(), State: api.Open, Since: time.Now().UTC(),
			UUID: u.device.UUID(), Cipher: segment.Cipher, KeyBits: segment.KeySize * 8, SectorSize: segment.SectorSize,
			Size: segment.Length, ReadOnly: spec.ReadOnly,
		}})
	} else if !c.quiet {
		_, err = fmt.Println(export.Path())
	}
	if err != nil {
		export.Abandon()
		return err
	}
	select {
	case <-export.Gone():
	case <-ctx.Done():
	}
	return closeWhenUnused(export)
}

// closeWhenUnused waits for the users of the export to leave it; a second interrupt ends the process at once.
func closeWhenUnused(export blockdev.Export) error {
	for told := false; ; told = true {
		err := export.Close(context.Background())
		if err == nil || export.Lost() {
			return err
		}
		if !told {
			cli.Note(os.Stderr, "%s is in use; waiting for it to be closed (interrupt again to end at once)", export.Path())
		}
		time.Sleep(200 * time.Millisecond)
	}
}
