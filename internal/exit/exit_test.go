package exit

import (
	"context"
	"errors"
	"fmt"
	"testing"
)

// The numbers are documented in doc/exit-codes.md and scripts rely on them.
func TestCodesNeverChange(t *testing.T) {
	want := map[Code]string{
		0: "ok", 1: "failed", 10: "no-device", 11: "busy", 12: "wrong-key", 13: "no-key", 14: "denied", 15: "unreached",
		16: "no-backend", 17: "bad-header", 18: "no-daemon", 64: "usage", 77: "not-allowed", 130: "interrupted",
	}
	if len(want) != len(words) {
		t.Fatalf("%d codes, want %d", len(words), len(want))
	}
	for code, word := range want {
		if got := code.String(); got != word {
			t.Errorf("code %d is %q, want %q", code, got, word)
		}
	}
}

func TestOf(t *testing.T) {
	wrongKey := New(WrongKey, "the key opens no key slot")
	for _, c := range []struct {
		name string
		err  error
		want Code
	}{
		{"nil", nil, OK},
		{"sentinel", wrongKey, WrongKey},
		{"wrapped twice", fmt.Errorf("attach: %w", fmt.Errorf("/dev/vdb: %w", wrongKey)), WrongKey},
		{"joined", errors.Join(errors.New("first"), wrongKey), WrongKey},
		{"cancelled", fmt.Errorf("attach: %w", context.Canceled), Interrupted},
		{"anything else", errors.New("odd"), Failed},
	} {
		if got := Of(c.err); got != c.want {
			t.Errorf("%s: code %d, want %d", c.name, got, c.want)
		}
	}
}
