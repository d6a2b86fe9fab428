package main

import (
	"context"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"voldek/blockdev"
	"voldek/internal/cli"
	"voldek/internal/exit"
)

// errTerminal keeps plaintext off the screen.
var errTerminal = exit.New(exit.Usage, "plaintext is not written to a terminal; redirect it: voldek cat … >FILE")

func catCommand(c *command) *cobra.Command {
	spec := blockdev.Spec{ReadOnly: true}
	var keys keySource
	var offset, length int64
	command := &cobra.Command{
		Use:   "cat DEVICE --key REF",
		Short: "Write the plaintext of a volume to standard output, without the daemon",
		Long: `Opens DEVICE read-only in this process, fetches the key and writes the plaintext to standard output. It needs no daemon,
no device-mapper and no FUSE, and on an image file no root: the way out when nothing else works. Only aes-xts volumes.`,
		Example: `  voldek cat disk.img --key file:disk.key >plain.img
  voldek cat /dev/vdb --key ask --offset 0 --length 4096 | file -`,
		Args: exactArgs("DEVICE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := c.complete(&spec, args[0]); err != nil {
				return err
			}
			if cli.IsTerminal(os.Stdout) {
				return errTerminal
			}
			return c.cat(cmd.Context(), spec, keys, offset, length)
		},
	}
	flags := command.Flags()
	keys.addFlags(flags)
	specFlags(flags, &spec, "plain-offset")
	flags.Int64Var(&offset, "offset", 0, "first byte of the plaintext")
	flags.Int64Var(&length, "length", -1, "bytes (default: to the end)")
	return command
}

func (c *command) cat(ctx context.Context, spec blockdev.Spec, keys keySource, offset, length int64) error {
	u, err := c.open(ctx, spec, keys)
	if err != nil {
		return err
	}
	defer u.device.Close()
	defer u.volumeKey.Wipe()
	size := u.device.Segment().Length
	if length < 0 {
		length = size - offset
	}
	if offset < 0 || offset > size || length > size-offset {
		return cli.UsageError{Err: fmt.Errorf("the volume has %d bytes", size)}
	}
	return u.device.WritePlaintext(ctx, os.Stdout, u.volumeKey, offset, length)
}
