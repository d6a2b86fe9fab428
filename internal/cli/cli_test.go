package cli

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"voldek/daemon/api"
	"voldek/internal/exit"
)

func TestReport(t *testing.T) {
	wrongKey := fmt.Errorf("/dev/vdb: %w", exit.New(exit.WrongKey, "the key opens no key slot"))
	for _, c := range []struct {
		name string
		err  error
		code exit.Code
		want string
	}{
		{"nothing", nil, exit.OK, ""},
		{"error and hint", wrongKey, exit.WrongKey, "voldek: error: /dev/vdb: the key opens no key slot\nvoldek: hint: nothing was changed; "},
		{"no hint where the cause is unknown", errors.New("odd"), exit.Failed, "voldek: error: odd\n"},
		{"an error of the daemon", &api.Error{Code: "denied", Exit: exit.Denied, Message: "no"}, exit.Denied, "voldek: error: no\n"},
		{"no escape sequence reaches the terminal", errors.New("a\x1b[2Jb\nc"), exit.Failed, "voldek: error: a [2Jb c\n"},
	} {
		var out bytes.Buffer
		if code := Report(&out, c.err, Subject{Device: "/dev/vdb"}, false); code != c.code {
			t.Errorf("%s: exit %d, want %d", c.name, code, c.code)
		}
		if got := out.String(); !strings.HasPrefix(got, c.want) || (c.want == "" && got != "") {
			t.Errorf("%s: %q", c.name, got)
		}
	}
}

func TestReportJSON(t *testing.T) {
	var out bytes.Buffer
	Report(&out, fmt.Errorf("x: %w", exit.New(exit.Unreached, "away")), Subject{}, true)
	var got struct {
		Version int
		Error   api.Error
	}
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	if got.Version != 1 || got.Error.Code != "unreached" || got.Error.Exit != 15 || got.Error.Message != "x: away" || got.Error.Hint == "" {
		t.Errorf("%+v", got)
	}
	if strings.Count(out.String(), "\n") != 1 {
		t.Errorf("not one line: %q", out.String())
	}
}

func TestTable(t *testing.T) {
	var out bytes.Buffer
	if err := PrintTable(&out, []string{"NAME", "EXPORT"}, [][]string{{"pg", "/dev/mapper/pg"}, {"longer-name", ""}}); err != nil {
		t.Fatal(err)
	}
	want := "NAME         EXPORT\npg           /dev/mapper/pg\nlonger-name  -\n"
	if out.String() != want {
		t.Errorf("got\n%swant\n%s", out.String(), want)
	}
}

func TestSizeAndSince(t *testing.T) {
	for bytes, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 100 << 30: "100.0 GiB", 1 << 62: "4.0 EiB"} {
		if got := Size(bytes); got != want {
			t.Errorf("Size(%d) = %q, want %q", bytes, got, want)
		}
	}
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for ago, want := range map[time.Duration]string{
		5 * time.Second: "5 s", 2 * time.Minute: "2 min", 3 * time.Hour: "3 h", 72 * time.Hour: "3 days",
	} {
		if got := Since(now.Add(-ago), now, true); got != want {
			t.Errorf("%v ago is %q, want %q", ago, got, want)
		}
	}
	if got := Since(now, now, false); got != "2026-01-02T03:04:05Z" {
		t.Errorf("got %q", got)
	}
}
