// Package doc tests the documents: what they name exists, and what exists is named. It knows no room but the words that
// the outside sees.
package doc

import (
	"bytes"
	"encoding/json"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"voldek/internal/config"
	"voldek/internal/exit"
	"voldek/internal/testenv"
	"voldek/keyclient"
)

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// find returns the first group of each match.
func find(pattern, text string) []string {
	var found []string
	for _, m := range regexp.MustCompile(pattern).FindAllStringSubmatch(text, -1) {
		found = append(found, m[1])
	}
	return found
}

// same reports what only one of two lists has; the order and repetitions do not matter.
func same(t *testing.T, what string, documented, real []string) {
	t.Helper()
	if len(real) == 0 {
		t.Errorf("%s: nothing was found to compare with", what)
	}
	for _, name := range documented {
		if !slices.Contains(real, name) {
			t.Errorf("%s: %q is described and does not exist", what, name)
		}
	}
	for _, name := range real {
		if !slices.Contains(documented, name) {
			t.Errorf("%s: %q exists and is not described", what, name)
		}
	}
}

// manPages returns the text of each page by its file name.
func manPages(t *testing.T) map[string]string {
	files, err := filepath.Glob("man/*.[1-8]")
	if err != nil || len(files) == 0 {
		t.Fatalf("no manual pages: %v", err)
	}
	pages := map[string]string{}
	for _, file := range files {
		pages[filepath.Base(file)] = read(t, file)
	}
	return pages
}

// help returns what a binary prints about itself.
func help(t *testing.T, binary string, args ...string) string {
	t.Helper()
	out, err := exec.Command(binary, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", filepath.Base(binary), strings.Join(args, " "), err, out)
	}
	return string(out)
}

// build makes both binaries.
func build(t *testing.T) (voldek, voldekd string) {
	dir := t.TempDir()
	testenv.Run(t, "go", "build", "-C", testenv.RepoRoot(), "-o", dir+"/", "./cmd/voldek", "./cmd/voldekd")
	return filepath.Join(dir, "voldek"), filepath.Join(dir, "voldekd")
}

const longFlag = `(?m)^ +(?:-\w, )?--([a-z][\w-]*)`

func TestCommands(t *testing.T) {
	voldek, voldekd := build(t)
	pages := manPages(t)
	root := help(t, voldek, "--help")
	_, list, _ := strings.Cut(root, "Available Commands:")
	list, _, _ = strings.Cut(list, "\n\n")
	global := find(longFlag, root)
	same(t, "voldek(1)", flagItems(pages["voldek.1"]), global)

	var verbs []string
	for _, verb := range find(`(?m)^  (\w+) `, list) {
		if verb == "completion" || verb == "help" {
			continue
		}
		verbs = append(verbs, verb)
		page := pages["voldek-"+verb+".1"]
		local, _, _ := strings.Cut(help(t, voldek, verb, "--help"), "\nGlobal Flags:")
		_, local, _ = strings.Cut(local, "\nFlags:")
		flags := slices.DeleteFunc(find(longFlag, local), func(f string) bool { return f == "help" })
		if len(flags) > 0 || len(flagItems(page)) > 0 {
			same(t, "voldek-"+verb+"(1)", flagItems(page), flags)
		}
		for _, mentioned := range find(`Fl \\-([a-z][\w-]*)`, page) {
			if !slices.Contains(flags, mentioned) && !slices.Contains(global, mentioned) {
				t.Errorf("voldek-%s(1) mentions --%s, which does not exist", verb, mentioned)
			}
		}
		if !strings.Contains(pages["voldek.1"], ".Xr voldek-"+verb+" 1") {
			t.Errorf("voldek(1) does not point to voldek-%s(1)", verb)
		}
	}
	var described []string
	for name := range pages {
		described = append(described, find(`^voldek-(\w+)\.1$`, name)...)
	}
	same(t, "verbs", described, verbs)
	same(t, "voldekd(8)", find(`(?m)^\.It Fl ([a-z][\w-]*)`, pages["voldekd.8"]), find(`(?m)^ +-([a-z][\w-]*)`, help(t, voldekd, "-h")))
	t.Run("examples", func(t *testing.T) { checkExamples(t, voldek, pages) })
}

// flagItems returns the long options that a page describes in a list item of their own.
func flagItems(page string) []string {
	var flags []string
	for _, line := range find(`(?m)^\.It Fl (.*)`, page) {
		flags = append(flags, find(`\\-([a-z][\w-]*)`, line)...)
	}
	return flags
}

// checkExamples runs each command line that a document shows with --help added: cobra then checks the verb and the options,
// and does nothing.
func checkExamples(t *testing.T, voldek string, pages map[string]string) {
	var lines []string
	for _, page := range pages {
		lines = append(lines, find(`(?m)^\.Dl [#$] (.*)`, page)...)
	}
	for _, file := range markdown(t) {
		lines = append(lines, find(`(?m)^ {4,}(?:[#$] |until )?(voldek .*)`, read(t, file))...)
	}
	n := 0
	for _, line := range lines {
		for _, command := range regexp.MustCompile(`&&|\|\||[|;]`).Split(line, -1) {
			command, _, _ = strings.Cut(command, " >")
			words := strings.Fields(command)
			if len(words) == 0 || words[0] != "voldek" {
				continue
			}
			n++
			if out, err := exec.Command(voldek, append(words[1:], "--help")...).CombinedOutput(); err != nil {
				t.Errorf("%s: %v\n%s", command, err, out)
			}
			for i, word := range words {
				if word != "--key" {
					continue
				}
				if _, err := keyclient.ParseRef(words[i+1]); err != nil && words[i+1] != "REF" {
					t.Errorf("%s: %v", command, err)
				}
			}
		}
	}
	if n < 10 {
		t.Errorf("only %d commands were found", n)
	}
}

func TestExitCodes(t *testing.T) {
	real := map[string]string{}
	for n := range 256 {
		if code := exit.Code(n); code == exit.Failed || code.String() != exit.Failed.String() {
			real[strconv.Itoa(n)] = code.String()
		}
	}
	documented := map[string]string{}
	for _, m := range regexp.MustCompile("(?m)^\\| (\\d+) \\| `([a-z-]+)` \\|").FindAllStringSubmatch(read(t, "exit-codes.md"), -1) {
		documented[m[1]] = m[2]
	}
	if !maps.Equal(real, documented) {
		t.Errorf("exit-codes.md has\n%v\nthe code has\n%v", documented, real)
	}
	numbers := slices.Collect(maps.Keys(real))
	for name, page := range manPages(t) {
		items := find(`(?m)^\.It (\d+)$`, page)
		switch {
		case name == "voldek.1":
			same(t, name, items, numbers)
		case len(items) == 0 && name != "voldek.toml.5":
			t.Errorf("%s names no exit status", name)
		}
		for _, item := range items {
			if real[item] == "" {
				t.Errorf("%s: there is no exit status %s", name, item)
			}
		}
	}
}

// keys returns the names that a table of the configuration has.
func keys(table reflect.Type) (names []string) {
	for i := range table.NumField() {
		field := table.Field(i)
		name, _, _ := strings.Cut(field.Tag.Get("toml"), ",")
		switch {
		case name != "":
			names = append(names, name)
		case field.Anonymous:
			names = append(names, keys(field.Type)...)
		}
	}
	return names
}

func TestConfigurationKeys(t *testing.T) {
	described := map[string][]string{}
	sections := strings.Split(read(t, "man/voldek.toml.5"), "\n.Ss ")[1:]
	sections[len(sections)-1], _, _ = strings.Cut(sections[len(sections)-1], "\n.Sh ")
	for _, section := range sections {
		table := find(`^\[+(\w+)`, section)[0]
		for _, item := range find(`(?m)^\.It Li (.*)`, section) {
			described[table] = append(described[table], strings.FieldsFunc(item, func(r rune) bool { return r == ' ' || r == ',' })...)
		}
	}
	same(t, "tables", slices.Collect(maps.Keys(described)), keys(reflect.TypeFor[config.File]()))
	same(t, "[daemon]", described["daemon"], keys(reflect.TypeFor[config.Daemon]()))
	same(t, "[service.NAME]", described["service"], keys(reflect.TypeFor[keyclient.Service]()))
	same(t, "[[volume]]", described["volume"], keys(reflect.TypeFor[config.Volume]()))
}

func TestConfigurationExamples(t *testing.T) {
	examples := []string{read(t, "voldek.toml.example")}
	for _, page := range manPages(t) {
		for _, text := range find(`(?s)\n\.Bd -literal[^\n]*\n(.*?)\n\.Ed`, page) {
			if strings.HasPrefix(text, "[") {
				examples = append(examples, text)
			}
		}
	}
	examples = append(examples, find("(?s)```toml\n(.*?)```", read(t, "../README.md"))...)
	if len(examples) < 3 {
		t.Errorf("only %d examples were found", len(examples))
	}
	for _, text := range examples {
		if _, err := config.Parse(text); err != nil {
			t.Errorf("%v in\n%s", err, text)
		}
	}
}

// The page and the code draw the same machine.
func TestStates(t *testing.T) {
	const arrow = `(?m)^(?://\t| {4})(\w+ +-> \w+ .*)$`
	same(t, "architecture.md: states", find(arrow, read(t, "architecture.md")), find(arrow, read(t, "../daemon/state.go")))
}

func TestDependencies(t *testing.T) {
	var module struct {
		Require []struct {
			Path     string
			Indirect bool
		}
	}
	text := testenv.Run(t, "go", "mod", "edit", "-json", filepath.Join(testenv.RepoRoot(), "go.mod"))
	if err := json.Unmarshal([]byte(text), &module); err != nil {
		t.Fatal(err)
	}
	described := find(`(?m)^- ([\w./-]+):`, read(t, "decisions/dependencies.md"))
	var all []string
	for _, r := range module.Require {
		all = append(all, r.Path)
		if !r.Indirect && !slices.Contains(described, r.Path) {
			t.Errorf("dependencies.md does not say what %s is for", r.Path)
		}
	}
	for _, path := range described {
		if !slices.Contains(all, path) {
			t.Errorf("dependencies.md names %s, which go.mod does not require", path)
		}
	}
}

// markdown returns README.md and the pages below doc.
func markdown(t *testing.T) []string {
	files := []string{"../README.md"}
	err := filepath.WalkDir(".", func(path string, _ fs.DirEntry, err error) error {
		if strings.HasSuffix(path, ".md") {
			files = append(files, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func TestLinks(t *testing.T) {
	for _, file := range markdown(t) {
		for _, link := range find(`\]\(([^)]+)\)`, read(t, file)) {
			path, anchor, _ := strings.Cut(link, "#")
			if strings.Contains(path, "://") {
				continue
			}
			target := file
			if path != "" {
				target = filepath.Join(filepath.Dir(file), path)
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s: %s leads nowhere", file, link)
				continue
			}
			if anchor != "" && !slices.Contains(anchors(read(t, target)), anchor) {
				t.Errorf("%s: %s has no such heading", file, link)
			}
		}
	}
}

// anchors returns what the headings of a page can be linked by.
func anchors(page string) (names []string) {
	for _, heading := range find(`(?m)^#+ (.*)$`, page) {
		name := regexp.MustCompile(`[^a-z0-9 -]`).ReplaceAllString(strings.ToLower(heading), "")
		names = append(names, strings.ReplaceAll(name, " ", "-"))
	}
	return names
}

func TestManPagesRender(t *testing.T) {
	testenv.Long(t)
	groff := testenv.Tool(t, "groff")
	for name := range manPages(t) {
		var warnings bytes.Buffer
		cmd := exec.Command(groff, "-mandoc", "-Tutf8", "-ww", "-z", filepath.Join("man", name))
		cmd.Stderr = &warnings
		if err := cmd.Run(); err != nil || warnings.Len() > 0 {
			t.Errorf("%s: %v\n%s", name, err, warnings.String())
		}
	}
}
