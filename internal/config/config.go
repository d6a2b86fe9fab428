// Package config reads /etc/voldek/voldek.toml, strictly: an unknown key is an error with its line. It holds no secret;
// services name credentials and files for those.
package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/BurntSushi/toml"

	"voldek/blockdev"
	"voldek/blockdev/luks"
	"voldek/daemon/api"
	"voldek/internal/exit"
	"voldek/keyclient"
)

// DefaultPath is where the configuration lies.
const DefaultPath = "/etc/voldek/voldek.toml"

// ErrConfig is returned for every fault of the file. Its text names the file, the line where one is known, and the key.
var ErrConfig = exit.New(exit.Usage, "bad configuration")

// maxSize bounds the file, in bytes.
const maxSize = 1 << 20

// File is the whole configuration.
type File struct {
	Daemon Daemon `toml:"daemon"`
	keyclient.Config
	Volumes []Volume `toml:"volume"`
}

// Daemon is the [daemon] table.
type Daemon struct {
	SocketGroup   string   `toml:"socket_group"`   // members may use the control socket; empty: root only
	RunDir        string   `toml:"run_dir"`        // journal and FUSE mounts
	AttachTimeout Duration `toml:"attach_timeout"` // for fetching a key
	Argon2Memory  int64    `toml:"argon2_memory"`  // MiB that all key derivations together may use
}

// Volume is a [[volume]] table: a volume the daemon knows by name.
type Volume struct {
	blockdev.Spec
	Key    []string `toml:"key"`     // references, tried in order
	AtBoot bool     `toml:"at_boot"` // attach when the daemon starts
}

// Duration is a time.Duration written like "30s".
type Duration time.Duration

// UnmarshalText parses time.ParseDuration's form.
func (d *Duration) UnmarshalText(text []byte) error {
	parsed, err := time.ParseDuration(string(text))
	*d = Duration(parsed)
	return err
}

// Default is the configuration of a host that has no file.
func Default() *File {
	return &File{Daemon: Daemon{
		RunDir:        "/run/voldek",
		AttachTimeout: Duration(30 * time.Second),
		Argon2Memory:  luks.DefaultLimits().Argon2Memory >> 20,
	}}
}

// Load reads the file at path. A missing file at DefaultPath is Default: attach with file: and credential: references
// needs no configuration.
func Load(path string) (*File, error) {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) && path == DefaultPath {
		return Default(), nil
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	if info.Size() > maxSize {
		return nil, fmt.Errorf("%w: %s is larger than %d bytes", ErrConfig, path, maxSize)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	file, err := Parse(string(text))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if file.HoldsSecrets() && info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s: %w: a KMS URI holds a secret, and others may read the file; chmod 600, or name a keyFile= or "+
			"keyCredential= instead", path, ErrConfig)
	}
	return file, nil
}

// Parse reads and checks a configuration.
func Parse(text string) (*File, error) {
	file := Default()
	meta, err := toml.Decode(text, file)
	if err != nil {
		var syntax toml.ParseError
		if errors.As(err, &syntax) {
			return nil, fmt.Errorf("%w: line %d: %s", ErrConfig, syntax.Position.Line, syntax.Message)
		}
		return nil, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	if unknown := meta.Undecoded(); len(unknown) > 0 {
		return nil, fmt.Errorf("%w: line %d: unknown key %s", ErrConfig, lineOf(text, unknown[0]), unknown[0])
	}
	if err := file.check(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	return file, nil
}

// lineOf finds the line that sets key; the parser gives no positions for keys it accepted. It finds the table by its
// header and takes the first assignment of the key below it.
func lineOf(text string, key toml.Key) int {
	table, last := strings.Join(key[:len(key)-1], "."), key[len(key)-1]
	inTable, name := table == "", ""
	for i, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			name = strings.Trim(strings.SplitN(line, "#", 2)[0], "[] \t")
			inTable = name == table
			if name == key.String() {
				return i + 1
			}
			continue
		}
		left, _, isAssignment := strings.Cut(line, "=")
		if inTable && isAssignment && strings.Trim(strings.TrimSpace(left), `"'`) == last {
			return i + 1
		}
	}
	return 1
}

// check validates what the decoder cannot, and fills in defaults of volumes.
func (f *File) check() error {
	if f.Daemon.AttachTimeout <= 0 {
		return fmt.Errorf("daemon.attach_timeout: want a positive duration")
	}
	if f.Daemon.Argon2Memory < 1 || f.Daemon.Argon2Memory > 1<<20 {
		return fmt.Errorf("daemon.argon2_memory: want 1 to 1048576 MiB")
	}
	if !strings.HasPrefix(f.Daemon.RunDir, "/") {
		return fmt.Errorf("daemon.run_dir: want an absolute path")
	}
	if err := f.Config.Check(); err != nil {
		return err
	}
	var names []string
	for i := range f.Volumes {
		v := &f.Volumes[i]
		if err := v.check(); err != nil {
			return fmt.Errorf("volume %q: %w", v.Name, err)
		}
		if slices.Contains(names, v.Name) {
			return fmt.Errorf("volume %q is there twice", v.Name)
		}
		names = append(names, v.Name)
	}
	return nil
}

func (v *Volume) check() error {
	if err := v.Spec.Check(); err != nil {
		return err
	}
	if len(v.Key) == 0 {
		return fmt.Errorf("key is missing")
	}
	for _, text := range v.Key {
		ref, err := keyclient.ParseRef(text)
		if err != nil {
			return err
		}
		if v.AtBoot && ref.FromCaller() {
			return fmt.Errorf("key %s needs somebody who brings the key; at_boot has nobody", ref)
		}
	}
	return nil
}

// Limits are the bounds on headers that this configuration sets.
func (f *File) Limits() luks.Limits {
	limits := luks.DefaultLimits()
	limits.Argon2Memory = min(limits.Argon2Memory, f.Daemon.Argon2Memory<<20)
	return limits
}

// Budget is the memory that all key derivations of this process share.
func (f *File) Budget() *luks.Budget { return luks.NewBudget(f.Daemon.Argon2Memory << 20) }

// AtBoot returns the attach requests of the volumes that are opened when the daemon starts.
func (f *File) AtBoot() []api.AttachRequest {
	var requests []api.AttachRequest
	for _, v := range f.Volumes {
		if v.AtBoot {
			requests = append(requests, api.AttachRequest{Spec: v.Spec, Keys: v.Key})
		}
	}
	return requests
}
