package config

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"voldek/internal/exit"
)

const good = `
[daemon]
run_dir = "/run/voldek"
attach_timeout = "45s"
argon2_memory = 512

[service.cluster]
type = "kms"
kms = "kms://cluster-kms?keyCredential=master&saltCredential=salt"
storage = "storage://no-store"

[[volume]]
name = "pg-data"
device = "/dev/vdb"
key = ["kms:cluster", "file:/etc/voldek/pg.key"]
at_boot = true

[[volume]]
name = "old"
device = "/srv/old.img"
type = "plain"
hash = "ripemd160"
key = ["file:/etc/voldek/old.key?as=hex"]
`

func TestParse(t *testing.T) {
	file, err := Parse(good)
	if err != nil {
		t.Fatal(err)
	}
	if got := file.Budget(); got == nil {
		t.Error("no budget")
	}
	if file.Limits().Argon2Memory != 512<<20 {
		t.Errorf("argon2 limit %d", file.Limits().Argon2Memory)
	}
	requests := file.AtBoot()
	if len(requests) != 1 || requests[0].Name != "pg-data" || len(requests[0].Keys) != 2 || requests[0].Via != "auto" {
		t.Errorf("at boot: %+v", requests)
	}
	if plain := file.Volumes[1]; plain.Cipher != "aes-xts-plain64" || plain.KeySize != 512 || plain.SectorSize != 512 {
		t.Errorf("defaults of plain mode: %+v", plain)
	}
}

// Each line spoils a good file; the error names the line or the key.
func TestRefusals(t *testing.T) {
	for _, c := range []struct{ name, old, new, want string }{
		{"unknown key", "attach_timeout", "atach_timeout", "line 4: unknown key daemon.atach_timeout"},
		{"unknown key of a volume", "at_boot = true", "atboot = true", "line 16: unknown key volume.atboot"},
		{"unknown table", "[daemon]", "[deamon]", "unknown key deamon"},
		{"syntax", `name = "pg-data"`, `name = pg-data`, "line 13"},
		{"duration", `"45s"`, `"45"`, "line 4"},
		{"negative duration", `"45s"`, `"-1s"`, "daemon.attach_timeout"},
		{"relative run_dir", `"/run/voldek"`, `"run"`, "daemon.run_dir"},
		{"memory", "512", "0", "daemon.argon2_memory"},
		{"name", `"pg-data"`, `"../x"`, "name"},
		{"name twice", `"old"`, `"pg-data"`, "twice"},
		{"relative device", `"/dev/vdb"`, `"vdb"`, "device"},
		{"no hash", `hash = "ripemd160"`, ``, "hash is missing"},
		{"cipher of LUKS", `at_boot = true`, `cipher = "aes-xts-plain64"`, "belong to type plain"},
		{"reference", `"kms:cluster", `, `"nonsense", `, "key reference"},
		{"key from nobody", `"kms:cluster", `, `"ask", `, "at_boot has nobody"},
		{"type of service", `type = "kms"`, `type = "kmz"`, "type"},
	} {
		t.Run(c.name, func(t *testing.T) {
			text := strings.Replace(good, c.old, c.new, 1)
			if text == good {
				t.Fatal("nothing was spoilt")
			}
			_, err := Parse(text)
			if !errors.Is(err, ErrConfig) || exit.Of(err) != exit.Usage || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

func TestLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "voldek.toml")
	if _, err := Load(path); !errors.Is(err, ErrConfig) {
		t.Errorf("a missing file: %v", err)
	}
	if err := os.WriteFile(path, []byte(good), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(path); err != nil {
		t.Error(err)
	}
	const secret = "keyCredential=master"
	inline := strings.Replace(good, secret, "key=MDEyMzQ1Njc4OWFiY2RlZg==", 1)
	for mode, ok := range map[os.FileMode]bool{0o600: true, 0o640: false, 0o644: false} {
		if err := errors.Join(os.WriteFile(path, []byte(inline), 0o600), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(path); (err == nil) != ok {
			t.Errorf("a secret in a file of mode %o: %v", mode, err)
		}
	}
	if err := os.WriteFile(path, []byte(strings.Repeat("#", maxSize+1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(path); !errors.Is(err, ErrConfig) {
		t.Errorf("a huge file: %v", err)
	}
}

func FuzzConfig(f *testing.F) {
	f.Add(good)
	f.Add("[[volume]]\nname=\"x\"")
	f.Add("[service.x]\ntype=\"barbican\"\nauth_url=\"https://k/v3\"")
	f.Fuzz(func(t *testing.T, text string) {
		file, err := Parse(text)
		if err != nil {
			if exit.Of(err) != exit.Usage {
				t.Errorf("exit %d: %v", exit.Of(err), err)
			}
			return
		}
		for _, request := range file.AtBoot() {
			if err := request.Check(); err != nil {
				t.Errorf("an accepted volume is refused later: %v", err)
			}
		}
	})
}
