package unlock

import (
	"context"
	"encoding/json"
	"errors"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"voldek/blockdev/luks"
	"voldek/internal/exit"
	"voldek/internal/secret"
	"voldek/keyclient"
)

// fakeDisk opens with the key "right".
type fakeDisk struct {
	tokens []luks.Token
	err    error // what a try ends with, instead
}

func (d *fakeDisk) UUID() string         { return "u" }
func (d *fakeDisk) Header() *luks.Header { return &luks.Header{Tokens: d.tokens} }
func (d *fakeDisk) Unlock(_ context.Context, key []byte, _ *luks.Budget) (*luks.VolumeKey, error) {
	if d.err != nil {
		return nil, d.err
	}
	if string(key) != "right" {
		return nil, luks.ErrWrongKey
	}
	return &luks.VolumeKey{}, nil
}

// fakeKeys answers by the credential's name: the key itself, "hang" until the deadline, "none" as no such key.
type fakeKeys struct{ asked []string }

func (k *fakeKeys) Fetch(ctx context.Context, ref keyclient.Ref, _ keyclient.Volume) (*secret.Buffer, error) {
	k.asked = append(k.asked, ref.ID)
	switch ref.ID {
	case "hang":
		<-ctx.Done()
		return nil, keyclient.ErrUnreached
	case "none":
		return nil, keyclient.ErrNoKey
	}
	return secret.FromBytes([]byte(ref.ID))
}

func refs(t *testing.T, texts ...string) (all []keyclient.Ref) {
	for _, text := range texts {
		ref, err := keyclient.ParseRef(text)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, ref)
	}
	return all
}

// A service that never answers leaves an equal part of the time to each reference behind it.
func TestADeadServiceLeavesTimeForTheNext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		keys := &fakeKeys{}
		a := Attempt{Refs: refs(t, "credential:hang", "credential:hang", "credential:right"), Keys: keys, Timeout: 30 * time.Second}
		result, err := a.Unlock(t.Context(), &fakeDisk{})
		if err != nil || result.Ref.ID != "right" {
			t.Fatal(err)
		}
		if waited := time.Since(start); waited != 20*time.Second {
			t.Errorf("waited %v", waited)
		}
	})
}

// Wrong keys and absent ones mean "try the next"; an I/O error ends the attempt with that error.
func TestAnErrorOfTheDiskEndsTheAttempt(t *testing.T) {
	keys := &fakeKeys{}
	a := Attempt{Refs: refs(t, "credential:right", "credential:right"), Keys: keys}
	_, err := a.Unlock(t.Context(), &fakeDisk{err: syscall.EIO})
	if !errors.Is(err, syscall.EIO) || len(keys.asked) != 1 {
		t.Errorf("%v after %d keys", err, len(keys.asked))
	}
}

func TestTheTokenNamesTheReferences(t *testing.T) {
	token := func(ref string) luks.Token {
		text, _ := json.Marshal(map[string]any{"type": TokenType, "keyslots": []string{"0"}, "ref": ref})
		return luks.Token{Type: TokenType, JSON: text}
	}
	for _, c := range []struct {
		name   string
		tokens []luks.Token
		code   exit.Code
	}{
		{"no token", nil, exit.NoKey},
		{"another's token", []luks.Token{{Type: "systemd-tpm2", JSON: []byte(`{}`)}}, exit.NoKey},
		{"a token that names a file", []luks.Token{token("file:/etc/shadow")}, exit.BadHeader},
		{"a token that names an address", []luks.Token{token("kms://evil.example/key")}, exit.BadHeader},
		{"a token that names a configured service", []luks.Token{token("kms:cluster")}, exit.WrongKey},
	} {
		a := Attempt{Refs: refs(t, "token"), Keys: &fakeKeys{}}
		if _, err := a.Unlock(t.Context(), &fakeDisk{tokens: c.tokens}); exit.Of(err) != c.code {
			t.Errorf("%s: exit %d, want %d: %v", c.name, exit.Of(err), c.code, err)
		}
	}
}
