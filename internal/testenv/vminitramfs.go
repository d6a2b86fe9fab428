package testenv

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// initramfs collects the files of a guest and writes them as the kernel's "newc" cpio archive.
type initramfs struct {
	t       testing.TB
	entries map[string]entry
}

type entry struct {
	mode uint32 // with the type bits
	data []byte
}

const (
	typeDir  = 0o040000
	typeFile = 0o100000
	typeLink = 0o120000
)

func newInitramfs(t testing.TB) *initramfs {
	return &initramfs{t, map[string]entry{}}
}

func (fs *initramfs) dir(name string) {
	name = strings.Trim(name, "/")
	if _, ok := fs.entries[name]; ok || name == "" || name == "." {
		return
	}
	fs.dir(path.Dir(name))
	fs.entries[name] = entry{typeDir | 0o755, nil}
}

func (fs *initramfs) put(name string, e entry) {
	name = strings.Trim(name, "/")
	fs.dir(path.Dir(name))
	fs.entries[name] = e
}

func (fs *initramfs) file(name string, data []byte) { fs.put(name, entry{typeFile | 0o755, data}) }

func (fs *initramfs) link(name, target string) { fs.put(name, entry{typeLink | 0o777, []byte(target)}) }

// copy puts a file of the host, or all files of a directory, into the guest.
func (fs *initramfs) copy(name, host string) {
	fs.t.Helper()
	st, err := os.Stat(host)
	if err != nil {
		fs.t.Fatal(err)
	}
	if st.IsDir() {
		list, err := os.ReadDir(host)
		if err != nil {
			fs.t.Fatal(err)
		}
		for _, e := range list {
			fs.copy(path.Join(name, e.Name()), filepath.Join(host, e.Name()))
		}
		return
	}
	data, err := os.ReadFile(host)
	if err != nil {
		fs.t.Fatal(err)
	}
	fs.file(name, data)
}

var libraryLine = regexp.MustCompile(`(?:=> )?(/\S+) \(0x`)

// program puts an executable of the host into the guest's /bin, with its shared libraries where it has any.
func (fs *initramfs) program(host string) {
	fs.t.Helper()
	fs.copy("bin/"+filepath.Base(host), host)
	out, err := exec.Command("ldd", host).CombinedOutput()
	if err != nil {
		return // not a dynamic executable
	}
	if strings.Contains(string(out), "not found") {
		fs.t.Fatalf("a library of %s is not installed:\n%s", host, out)
	}
	for _, match := range libraryLine.FindAllStringSubmatch(string(out), -1) {
		if _, ok := fs.entries[strings.Trim(match[1], "/")]; !ok {
			fs.copy(match[1], match[1])
		}
	}
}

// modules puts the named modules and what they depend on into the guest and returns them in load order. A module built
// into the kernel is passed over.
func (fs *initramfs) modules(k KernelImage, names []string) (order []string) {
	fs.t.Helper()
	dependencies, builtin := readModuleIndex(fs.t, k)
	add := func(file string) {
		base := moduleName(file)
		if slices.Contains(order, base) {
			return
		}
		order = append(order, base)
		fs.file("lib/modules/"+base+".ko", readModule(fs.t, filepath.Join(k.Modules, file)))
	}
	for _, name := range names {
		found := false
		for file, needs := range dependencies {
			if moduleName(file) != name {
				continue
			}
			for _, need := range slices.Backward(needs) { // modules.dep lists the last to load first
				add(need)
			}
			add(file)
			found = true
		}
		if !found && !builtin[name] {
			fs.t.Fatalf("kernel %s has no module %s", k.Version, name)
		}
	}
	return order
}

func readModuleIndex(t testing.TB, k KernelImage) (dependencies map[string][]string, builtin map[string]bool) {
	t.Helper()
	dep, err := os.ReadFile(filepath.Join(k.Modules, "modules.dep"))
	if err != nil {
		t.Fatal(err)
	}
	dependencies = map[string][]string{}
	for line := range strings.Lines(string(dep)) {
		file, needs, _ := strings.Cut(line, ":")
		dependencies[file] = strings.Fields(needs)
	}
	inside, err := os.ReadFile(filepath.Join(k.Modules, "modules.builtin"))
	if err != nil {
		t.Fatal(err)
	}
	builtin = map[string]bool{}
	for line := range strings.Lines(string(inside)) {
		builtin[moduleName(strings.TrimSpace(line))] = true
	}
	return dependencies, builtin
}

// moduleName turns kernel/drivers/md/dm-crypt.ko.xz into dm_crypt.
func moduleName(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// readModule returns a module as insmod of busybox wants it: uncompressed.
func readModule(t testing.TB, file string) []byte {
	t.Helper()
	tools := map[string]string{".xz": "xz", ".zst": "zstd", ".gz": "gzip"}
	tool, compressed := tools[filepath.Ext(file)]
	if !compressed {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	data, err := exec.Command(Tool(t, tool), "-dc", file).Output()
	if err != nil {
		t.Fatalf("%s -dc %s: %v", tool, file, err)
	}
	return data
}

// write writes the archive, uncompressed: unpacking takes the guest longer than QEMU needs to hand it over.
func (fs *initramfs) write(file string) {
	fs.t.Helper()
	var out bytes.Buffer
	inode := 0
	header := func(name string, mode uint32, size int) {
		inode++
		fmt.Fprintf(&out, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X", inode, mode, 0, 0, 1, 0, size,
			0, 0, 0, 0, len(name)+1, 0)
		out.WriteString(name + "\x00")
		pad(&out)
	}
	for _, name := range slices.Sorted(maps.Keys(fs.entries)) { // a directory sorts before what is in it
		e := fs.entries[name]
		header(name, e.mode, len(e.data))
		out.Write(e.data)
		pad(&out)
	}
	header("TRAILER!!!", 0, 0)
	if err := os.WriteFile(file, out.Bytes(), 0o600); err != nil {
		fs.t.Fatal(err)
	}
}

func pad(out *bytes.Buffer) {
	for out.Len()%4 != 0 {
		out.WriteByte(0)
	}
}
