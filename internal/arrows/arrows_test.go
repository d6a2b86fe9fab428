// Package arrows holds the forbidden imports of the house, each with its reason. Arrows point one way:
//
//	cmd -> daemon -> blockdev, keyclient -> luks, dm, fusedev -> xts, secret
package arrows

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"voldek/internal/testenv"
)

// rule forbids packages below From to import packages below To, by any way where To is ours, directly otherwise.
type rule struct {
	from   string
	to     []string
	but    []string
	reason string
}

var rules = []rule{
	{"voldek/blockdev/xts", []string{"voldek"}, nil, "the hot path stands alone, to be measured and read alone"},
	{"voldek/internal/exit", []string{"voldek"}, nil, "every room uses it"},
	{"voldek/internal/secret", []string{"voldek"}, nil, "every room uses it"},
	{"voldek/blockdev/luks", []string{"voldek"}, []string{"voldek/blockdev/xts", "voldek/internal/exit", "voldek/internal/secret"},
		"metadata is bytes: no kernel, no backend, no key service"},
	{"voldek/blockdev/luks", []string{"net", "os", "os/exec", "syscall", "golang.org/x/sys/unix"}, nil,
		"metadata is read from an io.ReaderAt, so that it can be fuzzed"},
	{"voldek/blockdev", []string{"voldek/keyclient", "voldek/daemon", "voldek/internal/config", "voldek/internal/unlock"}, nil,
		"blockdev gets keys as arguments and never fetches"},
	{"voldek/blockdev", []string{"net/http"}, nil, "blockdev gets keys as arguments and never fetches"},
	{"voldek/keyclient", []string{"voldek/blockdev", "voldek/daemon"}, nil, "key services know no disks"},
	{"voldek/daemon/client", []string{"voldek/keyclient", "voldek/internal/unlock"}, nil, "the CLI never fetches a key for the daemon"},
	{"voldek/cmd", []string{"voldek/blockdev/dm", "voldek/blockdev/fusedev", "voldek/blockdev/xts"}, nil,
		"commands go through blockdev, the one door to disks"},
	{"voldek/internal/cli", []string{"voldek/keyclient", "voldek/daemon/client"}, nil, "manners know no work"},
	{"voldek", []string{"voldek/internal/testenv"}, nil, "test machinery stays out of the binaries"},
	{"voldek", []string{"encoding/gob", "math/rand", "C"}, nil, "no cgo, no weak randomness, no gob"},
}

// directOnly marks the rules about commands: what they reach through blockdev is not theirs.
func directOnly(r rule, to string) bool { return !within(to, "voldek") || r.from == "voldek/cmd" }

// pkg is what go list tells of a package.
type pkg struct {
	ImportPath string
	Imports    []string
	Deps       []string
}

func TestImportsPointOneWay(t *testing.T) {
	for _, p := range packages(t) {
		for _, r := range rules {
			if bad, found := r.broken(p); found {
				t.Errorf("%s imports %s: %s", p.ImportPath, bad, r.reason)
			}
		}
	}
}

// The checker itself must be able to say no.
func TestAForbiddenImportIsFound(t *testing.T) {
	r := rule{from: "voldek/blockdev/luks", to: []string{"net"}, reason: "x"}
	if _, found := r.broken(pkg{ImportPath: "voldek/blockdev/luks", Imports: []string{"net"}}); !found {
		t.Error("a direct import was not found")
	}
	r = rule{from: "voldek/keyclient", to: []string{"voldek/blockdev"}, reason: "x"}
	if _, found := r.broken(pkg{ImportPath: "voldek/keyclient/barbican", Deps: []string{"voldek/blockdev/luks"}}); !found {
		t.Error("an indirect import was not found")
	}
	if _, found := r.broken(pkg{ImportPath: "voldek/keyclients", Deps: []string{"voldek/blockdev/luks"}}); found {
		t.Error("voldek/keyclients was taken for a room of voldek/keyclient")
	}
}

func (r rule) broken(p pkg) (string, bool) {
	if !within(p.ImportPath, r.from) {
		return "", false
	}
	for _, to := range r.to {
		imports := p.Deps
		if directOnly(r, to) {
			imports = p.Imports
		}
		for _, imported := range imports {
			allowed := imported == p.ImportPath || slices.ContainsFunc(r.but, func(b string) bool { return within(imported, b) })
			// A room may import its own lower rooms.
			allowed = allowed || within(imported, r.from) && r.from != "voldek"
			hit := within(imported, to)
			if !within(to, "voldek") {
				hit = imported == to
			}
			if hit && !allowed {
				return imported, true
			}
		}
	}
	return "", false
}

func within(path, parent string) bool { return path == parent || strings.HasPrefix(path, parent+"/") }

func packages(t *testing.T) []pkg {
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports,Deps", "./...")
	cmd.Dir = testenv.RepoRoot()
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var all []pkg
	for decoder := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := decoder.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	if len(all) < 5 {
		t.Fatalf("go list found %d packages only", len(all))
	}
	return all
}
