// Command voldek opens and closes encrypted volumes: attach, detach, list and status speak to voldekd; inspect, cat and
// export do without it.
package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"voldek/daemon/api"
	"voldek/internal/cli"
	"voldek/internal/config"
	"voldek/internal/secret"
)

// version is set by the build.
var version = "devel"

// command is what the verbs share: the global flags, and what an error is about.
type command struct {
	socket, config string
	json, quiet    bool
	about          cli.Subject
}

func main() {
	ctx, stop := cli.Signals()
	c := &command{about: cli.Subject{Help: "voldek --help"}}
	err := c.harden()
	if err == nil {
		err = newRoot(c).ExecuteContext(ctx)
	}
	stop()
	os.Exit(int(cli.Report(os.Stderr, err, c.about, c.json)))
}

// harden keeps keys that pass through this process out of core files and other processes' sight. A small limit of locked
// memory is the daemon's concern: what this process holds lives for seconds.
func (c *command) harden() error {
	_, err := secret.HardenProcess()
	return err
}

// newRoot returns the tree of commands.
func newRoot(c *command) *cobra.Command {
	root := &cobra.Command{
		Use:           "voldek",
		Short:         "Opens encrypted volumes when they are attached, with keys that stay in your key service",
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return cli.UsageError{Err: fmt.Errorf("there is no command %q", args[0])}
			}
			return cmd.Help()
		},
	}
	socket := os.Getenv("VOLDEK_SOCKET")
	if socket == "" {
		socket = api.DefaultSocket
	}
	flags := root.PersistentFlags()
	flags.StringVar(&c.socket, "socket", socket, "voldekd's control socket; also VOLDEK_SOCKET")
	flags.StringVar(&c.config, "config", config.DefaultPath, "configuration with the key services, for cat and export")
	flags.BoolVar(&c.json, "json", false, "answer with one JSON object")
	flags.BoolVarP(&c.quiet, "quiet", "q", false, "print errors only")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return cli.UsageError{Err: err} })
	root.AddCommand(attachCommand(c), detachCommand(c), listCommand(c), statusCommand(c), inspectCommand(c), catCommand(c), exportCommand(c))
	return root
}

// exactArgs is cobra.ExactArgs with a usage error that names what is missing.
func exactArgs(names ...string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) != len(names) {
			return cli.UsageError{Err: fmt.Errorf("want %s, got %d arguments", strings.Join(names, " "), len(args))}
		}
		return nil
	}
}
