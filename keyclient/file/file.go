// Package file reads keys and passwords that lie on this host: key files and systemd credentials. It does not know what
// the bytes are for.
package file

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"voldek/internal/exit"
	"voldek/internal/secret"
	"voldek/keyclient/call"
)

// MaxKey is the largest key file in bytes, the same as cryptsetup's.
const MaxKey = 8 << 20

// maxPassword bounds a password, token or other secret of the configuration, in bytes.
const maxPassword = 64 << 10

var name = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,64}$`)

// Read returns the whole content of a key file, a newline at its end included, as cryptsetup --key-file does. The last
// part of path may not be a symbolic link, and it must be a regular file. The caller wipes the buffer.
func Read(path string) (*secret.Buffer, error) { return read(path, MaxKey, nil) }

// Credential returns the content of a systemd credential: the file NAME in $CREDENTIALS_DIRECTORY.
func Credential(credential string) (*secret.Buffer, error) {
	path, err := credentialPath(credential)
	if err != nil {
		return nil, err
	}
	return read(path, MaxKey, nil)
}

func credentialPath(credential string) (string, error) {
	if !name.MatchString(credential) || credential == "." || credential == ".." {
		return "", exit.New(exit.Usage, "a credential's name has 1 to 64 letters, digits, dots, dashes or underscores")
	}
	dir := os.Getenv("CREDENTIALS_DIRECTORY")
	if dir == "" {
		return "", fmt.Errorf("credential %s: %w: systemd passed no credentials; set LoadCredential= in the unit",
			credential, call.ErrNoKey)
	}
	return filepath.Join(dir, credential), nil
}

// read opens without following a link at the end and without waiting on a fifo, then lets check refuse what it found.
func read(path string, limit int64, check func(fs.FileInfo) error) (*secret.Buffer, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%s: %w", path, call.ErrNoKey)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%s: %w: no permission to read it", path, call.ErrDenied)
	case errors.Is(err, unix.ELOOP):
		return nil, fmt.Errorf("%s: %w: it is a symbolic link, which is not followed", path, call.ErrDenied)
	case err != nil:
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	switch {
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s: %w: not a regular file", path, call.ErrContentType)
	case info.Size() == 0:
		return nil, fmt.Errorf("%s: %w: the file is empty", path, call.ErrNoKey)
	case info.Size() > limit:
		return nil, fmt.Errorf("%s: %w: longer than %d bytes", path, call.ErrContentType, limit)
	}
	if check != nil {
		if err := check(info); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
	// The size was just seen: a file that grows meanwhile is an error, not half a key.
	b, err := secret.ReadAll(f, int(info.Size()))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return b, nil
}

// Source says where a secret of the configuration is: "credential:NAME" or "file:PATH", never the secret itself.
type Source string

// Check reports a source of another form. It does not repeat the text, which may be a password.
func (s Source) Check() error {
	if path, ok := strings.CutPrefix(string(s), "file:"); ok && filepath.IsAbs(path) {
		return nil
	}
	if n, ok := strings.CutPrefix(string(s), "credential:"); ok && name.MatchString(n) && n != "." && n != ".." {
		return nil
	}
	return exit.New(exit.Usage, "is not a reference to a secret; write credential:NAME, or file:/PATH of a file of mode 0600")
}

// Read returns the secret without one newline at its end, as editors leave it. A file must belong to root or to the
// caller and be closed to group and others. It is read anew each time, so a rotated secret needs no restart.
func (s Source) Read() (*secret.Buffer, error) {
	if err := s.Check(); err != nil {
		return nil, err
	}
	kind, where, _ := strings.Cut(string(s), ":")
	check := Private
	if kind == "credential" {
		path, err := credentialPath(where)
		if err != nil {
			return nil, err
		}
		where, check = path, nil // systemd guards its directory
	}
	whole, err := read(where, maxPassword, check)
	if err != nil {
		return nil, err
	}
	return trimNewline(whole)
}

// Private refuses a file that somebody else than root and the caller may read or replace.
func Private(info fs.FileInfo) error {
	if perm := info.Mode().Perm(); perm&0o077 != 0 {
		return fmt.Errorf("%w: mode %04o lets others at the secret; chmod 0600 it", call.ErrDenied, perm)
	}
	if stat, ok := info.Sys().(*syscall.Stat_t); ok && stat.Uid != 0 && int(stat.Uid) != os.Geteuid() {
		return fmt.Errorf("%w: it belongs to uid %d, not to root or the caller", call.ErrDenied, stat.Uid)
	}
	return nil
}

// trimNewline takes over b.
func trimNewline(b *secret.Buffer) (*secret.Buffer, error) {
	n := b.Len()
	if n == 0 || b.Bytes()[n-1] != '\n' {
		return b, nil
	}
	defer b.Wipe()
	trimmed, err := secret.New(n - 1)
	if err != nil {
		return nil, err
	}
	copy(trimmed.Bytes(), b.Bytes())
	return trimmed, nil
}
