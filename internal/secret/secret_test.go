package secret

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

func TestFromBytesMovesAndWipesTheSource(t *testing.T) {
	src := []byte("correct horse")
	b, err := FromBytes(src)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Wipe()
	if string(b.Bytes()) != "correct horse" {
		t.Errorf("got %q", b.Bytes())
	}
	if !bytes.Equal(src, make([]byte, len(src))) {
		t.Error("the source still holds the secret")
	}
}

func TestNothingPrintsTheBytes(t *testing.T) {
	b, err := FromBytes([]byte("canary-7f3a"))
	if err != nil {
		t.Fatal(err)
	}
	defer b.Wipe()
	var logged bytes.Buffer
	slog.New(slog.NewTextHandler(&logged, nil)).Info("x", "key", b)
	asJSON, err := json.Marshal(map[string]any{"key": b})
	if err != nil {
		t.Fatal(err)
	}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d"} {
		logged.WriteString(fmt.Sprintf(verb, b))
	}
	logged.Write(asJSON)
	fmt.Fprint(&logged, errors.Join(fmt.Errorf("open: %v", b)))
	out := logged.String()
	if strings.Contains(out, "canary") || strings.Contains(out, "63616e617279") || strings.Contains(out, "99 97 110") {
		t.Errorf("the secret was printed: %s", out)
	}
	if strings.Count(out, Redacted) < 11 {
		t.Errorf("want %s for each way of printing: %s", Redacted, out)
	}
}

func TestWipeIsIdempotentAndUseAfterItPanics(t *testing.T) {
	b, err := FromBytes([]byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	b.Wipe()
	b.Wipe()
	(*Buffer)(nil).Wipe()
	defer func() {
		if recover() == nil {
			t.Error("Bytes after Wipe did not panic")
		}
	}()
	b.Bytes()
}

func TestReadAllIsBounded(t *testing.T) {
	for _, c := range []struct {
		input string
		limit int
		ok    bool
	}{{"", 0, true}, {"abc", 3, true}, {"abcd", 3, false}, {strings.Repeat("k", 9000), 9000, true}} {
		b, err := ReadAll(strings.NewReader(c.input), c.limit)
		if (err == nil) != c.ok {
			t.Errorf("%d bytes, limit %d: %v", len(c.input), c.limit, err)
		}
		if err != nil {
			continue
		}
		if string(b.Bytes()) != c.input {
			t.Errorf("%d bytes, limit %d: other bytes", len(c.input), c.limit)
		}
		b.Wipe()
	}
}

// The kernel's own word on the mapping: locked ("lo"), left out of dumps ("dd"), wiped on fork ("wf").
func TestMappingIsLockedAndNotDumped(t *testing.T) {
	b, err := New(100)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Wipe()
	if Unlocked() != 0 {
		t.Skip("RLIMIT_MEMLOCK is too small here")
	}
	flags := vmFlags(t, fmt.Sprintf("%x-", uintptr(unsafe.Pointer(&b.mapping[pageSize]))))
	for _, want := range []string{"lo", "dd", "wf"} {
		if !strings.Contains(" "+flags+" ", " "+want+" ") {
			t.Errorf("VmFlags %q lack %q", flags, want)
		}
	}
}

func vmFlags(t *testing.T, start string) string {
	smaps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	_, after, found := strings.Cut(string(smaps), "\n"+start)
	if !found {
		t.Fatalf("no mapping starts at %s", start)
	}
	_, flags, _ := strings.Cut(after, "VmFlags: ")
	flags, _, _ = strings.Cut(flags, "\n")
	return flags
}

func TestHardenProcess(t *testing.T) {
	if _, err := HardenProcess(); err != nil {
		t.Fatal(err)
	}
	dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	if err != nil || dumpable != 0 {
		t.Errorf("dumpable is %d, %v", dumpable, err)
	}
}
