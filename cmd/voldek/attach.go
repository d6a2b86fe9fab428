package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"voldek/daemon/api"
	"voldek/daemon/client"
	"voldek/internal/cli"
	"voldek/internal/secret"
	"voldek/keyclient"
)

func attachCommand(c *command) *cobra.Command {
	var request api.AttachRequest
	var timeout time.Duration
	command := &cobra.Command{
		Use:   "attach DEVICE --key REF",
		Short: "Open a volume through the daemon and print where its plaintext is",
		Long: `Opens a LUKS1, LUKS2 or plain volume: the daemon reads the header, fetches the key, proves it and exports the plaintext as
a block device (via kernel: dm-crypt) or as a file (via fuse). Nothing is written to DEVICE. Repeating the command is
harmless: an open volume is answered as it is.`,
		Example: `  voldek attach /dev/vdb --key barbican:6c9a2f0e-1111-4222-8333-444455556666 --name pg-data
  voldek attach disk.img --key file:/etc/voldek/disk.key --via fuse --read-only`,
		Args: exactArgs("DEVICE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			request.Timeout = timeout.Seconds()
			return c.attach(cmd.Context(), args[0], request)
		},
	}
	flags := command.Flags()
	keyFlag(flags, &request.Keys)
	specFlags(flags, &request.Spec, "offset")
	flags.StringVar(&request.Name, "name", "", "name of the volume (default: the last element of DEVICE)")
	flags.StringVar((*string)(&request.Via), "via", "auto", "auto, kernel or fuse")
	flags.BoolVar(&request.ReadOnly, "read-only", false, "never write to DEVICE")
	flags.DurationVar(&timeout, "timeout", 30*time.Second, "for fetching the key")
	flags.BoolVar(&request.AllowDiscards, "allow-discards", false, "pass discards on; they show which sectors are unused")
	flags.BoolVar(&request.NoReadWorkqueue, "perf-no_read_workqueue", false, "kernel: decrypt in the caller's context")
	flags.BoolVar(&request.NoWriteWorkqueue, "perf-no_write_workqueue", false, "kernel: encrypt in the caller's context")
	flags.BoolVar(&request.SameCPUCrypt, "perf-same_cpu_crypt", false, "kernel: encrypt on the CPU that sent the request")
	flags.BoolVar(&request.SubmitFromCryptCPUs, "perf-submit_from_crypt_cpus", false, "kernel: submit writes from the encrypting CPU")
	return command
}

func (c *command) attach(ctx context.Context, device string, request api.AttachRequest) error {
	if err := c.complete(&request.Spec, device); err != nil {
		return err
	}
	refs, err := parseKeys(request.Keys)
	if err != nil {
		return err
	}
	key, err := bringKey(ctx, refs, keyclient.Volume{Name: request.Name})
	if err != nil {
		return err
	}
	defer key.Wipe()
	request.Keys = nil
	for _, ref := range refs {
		request.Keys = append(request.Keys, ref.String())
	}
	daemon := client.New(c.socket)
	stop := c.showProgress(ctx, daemon, request.Name)
	volume, err := daemon.Attach(ctx, request, key)
	stop()
	if ctx.Err() != nil {
		return c.afterInterrupt(daemon, request.Name)
	}
	if err != nil {
		return err
	}
	if c.json {
		return cli.PrintJSON(os.Stdout, api.Answer{Version: api.Version, Volume: volume})
	}
	if !c.quiet {
		fmt.Printf("%s  %s  %s  %s  %s\n", volume.Name, volume.Export, volume.Via, volume.Cipher, cli.Size(volume.Size))
	}
	return nil
}

// bringKey reads the key that a reference - or ask stands for: the daemon has neither our standard input nor our terminal.
func bringKey(ctx context.Context, refs []keyclient.Ref, v keyclient.Volume) (*secret.Buffer, error) {
	for _, ref := range refs {
		if !ref.FromCaller() {
			continue
		}
		brought, err := keyclient.New(keyclient.Config{}, keyclient.WithStdin(os.Stdin), keyclient.WithAsk(keyclient.Ask))
		if err != nil {
			return nil, err
		}
		return brought.Fetch(ctx, ref, v)
	}
	return nil, nil
}

// afterInterrupt says what an interrupted attach has left: the daemon undoes it, unless it was open already.
func (c *command) afterInterrupt(daemon *client.Client, name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	volume, err := daemon.Status(ctx, name)
	if err == nil && volume.State == api.Open {
		cli.Note(os.Stderr, "interrupted; %s is open: voldek detach %s", name, name)
	} else {
		cli.Note(os.Stderr, "interrupted; nothing left open")
	}
	return context.Canceled
}

// showProgress tells a person who has waited for a second what is being waited for. The returned function ends it.
func (c *command) showProgress(ctx context.Context, daemon *client.Client, name string) (stop func()) {
	if c.quiet || c.json || !cli.IsTerminal(os.Stderr) {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for wait := time.Second; ; wait = 10 * time.Second {
			select {
			case <-ctx.Done():
				return
			case <-time.After(wait):
			}
			if volume, err := daemon.Status(ctx, name); err == nil {
				cli.Note(os.Stderr, "%s: %s", name, map[api.State]string{
					api.Fetching:  "waiting for the key service",
					api.Unlocking: "deriving the volume key",
				}[volume.State])
			}
		}
	}()
	return func() { cancel(); <-done }
}

func detachCommand(c *command) *cobra.Command {
	return &cobra.Command{
		Use:     "detach NAME",
		Short:   "Flush and close a volume",
		Long:    `Flushes a volume, takes its export down and gives the device back. A volume that is not open is no error.`,
		Example: `  voldek detach pg-data`,
		Args:    exactArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			volume, err := client.New(c.socket).Detach(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if c.json {
				return cli.PrintJSON(os.Stdout, api.Answer{Version: api.Version, Volume: volume})
			}
			return nil
		},
	}
}
