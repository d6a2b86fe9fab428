// Package cli holds the manners of the commands. The rules:
//
//   - Answers go to stdout. Everything else goes to stderr as "voldek: ".
//   - An error is one line, "voldek: error: what: why"; a hint ends in a command that works.
//   - With --json an answer is one object with "version": 1, and an error is the last line of stderr.
//   - Plaintext and keys never go to a terminal.
package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"golang.org/x/term"

	"voldek/daemon/api"
	"voldek/internal/exit"
)

// UsageError marks a command line that cannot be understood.
type UsageError struct{ Err error }

func (e UsageError) Error() string       { return e.Err.Error() }
func (e UsageError) ExitCode() exit.Code { return exit.Usage }

// Subject is what an error is about, for its hint.
type Subject struct {
	Device string
	Help   string // a command that explains how to do it right
}

// Report prints err and its hint to w and returns the exit code.
func Report(w io.Writer, err error, about Subject, asJSON bool) exit.Code {
	if err == nil {
		return exit.OK
	}
	code := exit.Of(err)
	hint := hintFor(code, about)
	if asJSON {
		line, _ := json.Marshal(api.Answer{Version: api.Version, Error: api.NewError(err, hint)})
		fmt.Fprintf(w, "%s\n", line)
		return code
	}
	message := err.Error()
	if code == exit.Interrupted && errors.Is(err, context.Canceled) {
		message = "interrupted"
	}
	fmt.Fprintf(w, "voldek: error: %s\n", oneLine(message))
	if hint != "" {
		fmt.Fprintf(w, "voldek: hint: %s\n", hint)
	}
	return code
}

// Note prints something that is neither the answer nor an error.
func Note(w io.Writer, format string, args ...any) {
	fmt.Fprintf(w, "voldek: %s\n", oneLine(fmt.Sprintf(format, args...)))
}

// hintFor gives advice only where the code makes the cause known.
func hintFor(code exit.Code, about Subject) string {
	switch code {
	case exit.WrongKey:
		if about.Device != "" {
			return "nothing was changed; the volume was formatted with another key, or the key has another form (?as=hex, raw or " +
				"base64); see: voldek inspect " + about.Device
		}
	case exit.NoKey:
		return "nothing was changed; look at the reference, and at the services in /etc/voldek/voldek.toml: voldekd --check-config"
	case exit.Unreached:
		return "nothing was changed; try again, with more patience: --timeout 5m"
	case exit.Busy:
		return "see what is open: voldek list"
	case exit.BadHeader:
		if about.Device != "" {
			return "nothing was opened; compare: cryptsetup luksDump " + about.Device
		}
	case exit.NoBackend:
		return "load one of the kernel modules: modprobe dm_crypt; or: modprobe fuse"
	case exit.NoDaemon:
		return "start the daemon: systemctl start voldekd; or do without it: voldek export --help"
	case exit.NotAllowed:
		return "run the command as root, or join the group socket_group of /etc/voldek/voldek.toml"
	case exit.Usage:
		return about.Help
	}
	return ""
}

// oneLine keeps control characters of whatever an error quotes away from the terminal.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, s)
}

// PrintJSON prints one object.
func PrintJSON(w io.Writer, v any) error {
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	return encoder.Encode(v)
}

// PrintTable prints rows under an upper-case head, two spaces between columns, "-" for an empty cell.
func PrintTable(w io.Writer, head []string, rows [][]string) error {
	width := make([]int, len(head))
	all := append([][]string{head}, rows...)
	for _, row := range all {
		for i := range row {
			if row[i] == "" {
				row[i] = "-"
			}
			width[i] = max(width[i], len(row[i]))
		}
	}
	for _, row := range all {
		var line strings.Builder
		for i, cell := range row {
			fmt.Fprintf(&line, "%-*s  ", width[i], cell)
		}
		if _, err := fmt.Fprintln(w, strings.TrimRight(line.String(), " ")); err != nil {
			return err
		}
	}
	return nil
}

// Size writes bytes in IEC units.
func Size(bytes int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	value, unit := float64(bytes), 0
	for value >= 1024 && unit < len(units)-1 {
		value, unit = value/1024, unit+1
	}
	if unit == 0 {
		return fmt.Sprintf("%d B", bytes)
	}
	return fmt.Sprintf("%.1f %s", value, units[unit])
}

// Since writes a time relative to now for a person, as RFC 3339 for a program.
func Since(t, now time.Time, person bool) string {
	if t.IsZero() {
		return ""
	}
	if !person {
		return t.UTC().Format(time.RFC3339)
	}
	switch d := now.Sub(t); {
	case d < time.Minute:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", int(d.Hours()))
	default:
		return fmt.Sprintf("%d days", int(d.Hours()/24))
	}
}

// IsTerminal reports whether w is a terminal.
func IsTerminal(w any) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// Signals returns a context that ends with the first SIGINT or SIGTERM; a second one ends the process at once.
func Signals() (context.Context, context.CancelFunc) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}
