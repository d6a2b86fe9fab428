package keyclient_test

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"voldek/internal/exit"
	"voldek/internal/secret"
	"voldek/keyclient"
	"voldek/keyclient/keytest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The vectors of Constellation's derivation for inlineKey and inlineSalt.
const (
	vectorUUID = "2f1c0a4e-1111-4222-8333-444455556666"
	vectorKey  = "c84236109cd4dea10ae6b6cfa19ec1a75493e5a57b81d8a75e476150306efdda"
)

func open(t testing.TB, services map[string]keyclient.Service, options ...keyclient.Option) *keyclient.Clients {
	t.Helper()
	c, err := keyclient.New(keyclient.Config{Services: services}, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func fetch(t testing.TB, c keyclient.Client, ref string, v keyclient.Volume) (string, error) {
	t.Helper()
	r, err := keyclient.ParseRef(ref)
	if err != nil {
		t.Fatal(err)
	}
	key, err := c.Fetch(t.Context(), r, v)
	if err != nil {
		return "", err
	}
	defer key.Wipe()
	return string(key.Bytes()), nil
}

func write(t testing.TB, mode os.FileMode, content string) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestLocalReferences(t *testing.T) {
	t.Setenv("CREDENTIALS_DIRECTORY", t.TempDir())
	if err := os.WriteFile(filepath.Join(os.Getenv("CREDENTIALS_DIRECTORY"), "c.key"), []byte("from systemd\n"), 0o400); err != nil {
		t.Fatal(err)
	}
	keyFile := write(t, 0o644, "line\n\x00\xff")
	asked := ""
	c := open(t, nil, keyclient.WithStdin(strings.NewReader("typed\n")),
		keyclient.WithAsk(func(_ context.Context, prompt string) (*secret.Buffer, error) {
			asked = prompt
			return secret.FromBytes([]byte("by hand"))
		}))
	for ref, want := range map[string]string{
		"file:" + keyFile:                "line\n\x00\xff",
		"file:" + keyFile + "?as=hex":    "6c696e650a00ff",
		"file:" + keyFile + "?as=base64": "bGluZQoA/w==",
		"credential:c.key":               "from systemd\n",
		"-":                              "typed\n",
		"ask":                            "by hand",
	} {
		if got, err := fetch(t, c, ref, keyclient.Volume{Name: "pg"}); err != nil || got != want {
			t.Errorf("%s: %q, %v", ref, got, err)
		}
	}
	if asked != "Passphrase of pg: " {
		t.Errorf("prompt %q", asked)
	}
}

func TestRefusedFiles(t *testing.T) {
	dir := t.TempDir()
	key := write(t, 0o600, "key")
	link, fifo := filepath.Join(dir, "link"), filepath.Join(dir, "fifo")
	huge, most := filepath.Join(dir, "huge"), filepath.Join(dir, "most")
	for _, err := range []error{os.Symlink(key, link), unix.Mkfifo(fifo, 0o600), os.WriteFile(huge, nil, 0o600),
		os.Truncate(huge, 8<<20+1), os.WriteFile(most, nil, 0o600), os.Truncate(most, 8<<20)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	c := open(t, nil)
	for path, want := range map[string]struct {
		code exit.Code
		text string
	}{
		filepath.Join(dir, "none"): {exit.NoKey, "no such key"},
		write(t, 0o600, ""):        {exit.NoKey, "the file is empty"},
		link:                       {exit.Denied, "symbolic link"},
		fifo:                       {exit.Failed, "not a regular file"},
		dir:                        {exit.Failed, "not a regular file"},
		"/dev/zero":                {exit.Failed, "not a regular file"},
		huge:                       {exit.Failed, "longer than 8388608 bytes"},
	} {
		_, err := fetch(t, c, "file:"+path, keyclient.Volume{})
		if exit.Of(err) != want.code || !strings.Contains(fmt.Sprint(err), path+": ") || !strings.Contains(err.Error(), want.text) {
			t.Errorf("%s: code %d: %v", path, exit.Of(err), err)
		}
	}
	if got, err := fetch(t, c, "file:"+most, keyclient.Volume{}); err != nil || len(got) != 8<<20 {
		t.Errorf("the longest key: %d bytes, %v", len(got), err)
	}
}

func TestStdin(t *testing.T) {
	broken := errors.New("broken")
	for name, c := range map[string]struct {
		input io.Reader
		size  int
		code  exit.Code
	}{
		"empty":     {strings.NewReader(""), 0, exit.NoKey},
		"a page":    {strings.NewReader(strings.Repeat("k", 4096)), 4096, exit.OK},
		"by bytes":  {iotest.OneByteReader(strings.NewReader(strings.Repeat("k", 9000))), 9000, exit.OK},
		"with EOF":  {iotest.DataErrReader(strings.NewReader("key")), 3, exit.OK},
		"longest":   {io.LimitReader(zeros{}, 8<<20), 8 << 20, exit.OK},
		"too long":  {io.LimitReader(zeros{}, 8<<20+1), 0, exit.Failed},
		"endless":   {zeros{}, 0, exit.Failed},
		"an error":  {iotest.ErrReader(broken), 0, exit.Failed},
		"cut short": {io.MultiReader(strings.NewReader("half"), iotest.ErrReader(broken)), 0, exit.Failed},
	} {
		got, err := fetch(t, open(t, nil, keyclient.WithStdin(c.input)), "-", keyclient.Volume{})
		if exit.Of(err) != c.code || len(got) != c.size {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestWhatADaemonCanNotFetch(t *testing.T) {
	t.Setenv("CREDENTIALS_DIRECTORY", "")
	c := open(t, map[string]keyclient.Service{"local": {Type: "kms", KMS: cluster}})
	for ref, want := range map[string]struct {
		code exit.Code
		text string
	}{
		"-":                           {exit.Usage, "a daemon has not"},
		"ask":                         {exit.Usage, "a daemon has not"},
		"token":                       {exit.Usage, "the volume's LUKS2 header"},
		"barbican:" + uuid:            {exit.Usage, `none has type = "barbican"`},
		"barbican:" + uuid + "@no":    {exit.Usage, "[service.no]"},
		"barbican:" + uuid + "@local": {exit.Usage, `with type = "barbican"`},
		"kms:other":                   {exit.Usage, "[service.other]"},
		"kms:local":                   {exit.Usage, "has no LUKS UUID"},
		"credential:x":                {exit.NoKey, "systemd passed no credentials"},
	} {
		_, err := fetch(t, c, ref, keyclient.Volume{})
		if exit.Of(err) != want.code || !strings.Contains(fmt.Sprint(err), want.text) {
			t.Errorf("%s: %v", ref, err)
		}
	}
	if _, err := c.Fetch(t.Context(), keyclient.Ref{}, keyclient.Volume{}); exit.Of(err) != exit.Usage {
		t.Errorf("zero reference: %v", err)
	}
}

func TestWhichService(t *testing.T) {
	barbican := func(isDefault bool) keyclient.Service {
		return keyclient.Service{Type: "barbican", Default: isDefault, AuthURL: "https://127.0.0.1:1", Token: "credential:none"}
	}
	local := keyclient.Service{Type: "kms", KMS: cluster}
	for name, c := range map[string]struct {
		services map[string]keyclient.Service
		want     string
	}{
		"the default one": {map[string]keyclient.Service{"a": barbican(false), "b": barbican(true), "c": local}, "$CREDENTIALS"},
		"the only one":    {map[string]keyclient.Service{"a": barbican(false), "c": local}, "$CREDENTIALS"},
		"neither":         {map[string]keyclient.Service{"a": barbican(false), "b": barbican(false)}, "one of: a, b"},
	} {
		t.Setenv("CREDENTIALS_DIRECTORY", "")
		_, err := fetch(t, open(t, c.services), "barbican:"+uuid, keyclient.Volume{})
		want := strings.ReplaceAll(c.want, "$CREDENTIALS", "systemd passed no credentials")
		if !strings.Contains(fmt.Sprint(err), want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestClusterKMS(t *testing.T) {
	key, salt := write(t, 0o600, inlineKey+"\n"), write(t, 0o400, strings.TrimRight(inlineSalt, "="))
	services := map[string]keyclient.Service{
		"inline": {Type: "kms", KMS: cluster},
		"files":  {Type: "kms", KMS: keyclient.URI("kms://cluster-kms?keyFile=" + key + "&saltFile=" + salt), Storage: "storage://no-store"},
	}
	c := open(t, services)
	for _, name := range []string{"inline", "files"} {
		for ref, want := range map[string]string{
			"kms:" + name + "?as=hex":                    vectorKey,
			"kms:" + name + "/" + vectorUUID + "?as=hex": vectorKey,
			"kms:" + name + "/measurementSecret?as=hex":  "dd8470bec51a4164968c48f153adb0be66444ef73e87297fafc91361e4af7f72",
		} {
			got, err := fetch(t, c, ref, keyclient.Volume{UUID: strings.ToUpper(vectorUUID)})
			if err != nil || got != want {
				t.Errorf("%s: %s, %v", ref, got, err)
			}
		}
	}
	raw, err := fetch(t, c, "kms:inline", keyclient.Volume{UUID: vectorUUID})
	if err != nil || hex.EncodeToString([]byte(raw)) != vectorKey {
		t.Errorf("raw: %d bytes, %v", len(raw), err)
	}
}

func TestSecretsOfTheConfigurationMustBePrivate(t *testing.T) {
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(write(t, 0o600, inlineKey), link); err != nil {
		t.Fatal(err)
	}
	others := write(t, 0o600, inlineKey)
	if os.Getuid() == 0 {
		if err := os.Chown(others, 4711, 4711); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		path string
		code exit.Code
	}{
		"0600":  {write(t, 0o600, inlineKey), exit.OK},
		"0640":  {write(t, 0o640, inlineKey), exit.Denied},
		"0604":  {write(t, 0o604, inlineKey), exit.Denied},
		"link":  {link, exit.Denied},
		"none":  {"/nonexistent", exit.NoKey},
		"text":  {write(t, 0o600, "canary, not base64"), exit.Usage},
		"lines": {write(t, 0o600, inlineKey[:8]+"\n"+inlineKey[8:]), exit.Usage},
		"short": {write(t, 0o600, "Y2FuYXJ5"), exit.Usage},
		"owner": {others, map[bool]exit.Code{true: exit.Denied}[os.Getuid() == 0]},
	} {
		s := keyclient.Service{Type: "kms", KMS: keyclient.URI("kms://cluster-kms?keyFile=" + c.path + "&salt=" + inlineSalt)}
		_, err := fetch(t, open(t, map[string]keyclient.Service{"x": s}), "kms:x/k", keyclient.Volume{})
		if exit.Of(err) != c.code || err != nil && strings.Contains(err.Error(), "canary") {
			t.Errorf("%s: code %d: %v", name, exit.Of(err), err)
		}
	}
}

func TestConformanceOfLocalRooms(t *testing.T) {
	key := write(t, 0o600, "file key")
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(key, link); err != nil {
		t.Fatal(err)
	}
	t.Run("file", func(t *testing.T) {
		keytest.Run(t, keytest.Room{
			Known: mustParse(t, "file:"+key), Key: []byte("file key"),
			Missing: mustParse(t, "file:/nonexistent"), Denied: mustParse(t, "file:"+link),
			Open: func(t *testing.T, _ *keytest.Network) *keyclient.Clients { return open(t, nil) },
		})
	})
	t.Run("cluster", func(t *testing.T) {
		secretKey, err := hex.DecodeString(vectorKey)
		if err != nil {
			t.Fatal(err)
		}
		services := map[string]keyclient.Service{
			"x":       {Type: "kms", KMS: cluster},
			"missing": {Type: "kms", KMS: keyclient.URI("kms://cluster-kms?keyFile=/nonexistent&salt=" + inlineSalt)},
			"denied":  {Type: "kms", KMS: keyclient.URI("kms://cluster-kms?keyFile=" + write(t, 0o644, inlineKey) + "&salt=" + inlineSalt)},
		}
		keytest.Run(t, keytest.Room{
			Known: mustParse(t, "kms:x/"+vectorUUID), Key: secretKey,
			Missing: mustParse(t, "kms:missing/k"), Denied: mustParse(t, "kms:denied/k"),
			Open: func(t *testing.T, _ *keytest.Network) *keyclient.Clients { return open(t, services) },
		})
	})
}

func mustParse(t testing.TB, s string) keyclient.Ref {
	r, err := keyclient.ParseRef(s)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// A pseudo terminal is the person at the keyboard, who types once the prompt is there.
func TestAsk(t *testing.T) {
	keyboard, tty := terminal(t)
	screen := make([]byte, 200)
	go func() {
		if n, err := io.ReadFull(keyboard, screen[:12]); err != nil {
			t.Errorf("prompt %q: %v", screen[:n], err)
		}
		_, _ = keyboard.WriteString("correct horse\n")
	}()
	b, err := keyclient.AskOn(t.Context(), tty, "Passphrase: ")
	if err != nil {
		t.Fatal(err)
	}
	defer b.Wipe()
	if string(b.Bytes()) != "correct horse" {
		t.Errorf("%d bytes", b.Len())
	}
	n, err := keyboard.Read(screen[12:])
	if got := string(screen[:12+n]); err != nil || got != "Passphrase: \r\n" {
		t.Errorf("on the screen: %q, %v", got, err)
	}
}

func TestAskGivesUpAndRestoresTheTerminal(t *testing.T) {
	keyboard, tty := terminal(t)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		_, _ = io.ReadFull(keyboard, make([]byte, 12)) // the prompt
		if echo(t, keyboard) {
			t.Error("the terminal shows what is typed")
		}
		cancel()
	}()
	if _, err := keyclient.AskOn(ctx, tty, "Passphrase: "); exit.Of(err) != exit.Interrupted {
		t.Errorf("got %v", err)
	}
	if !echo(t, keyboard) {
		t.Error("the terminal still hides what is typed")
	}
}

func TestAskNeedsATerminal(t *testing.T) {
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if _, err := keyclient.AskOn(t.Context(), null, "Passphrase: "); !errors.Is(err, unix.ENOTTY) {
		t.Errorf("got %v", err)
	}
}

// echo reports the terminal's setting, which both of its ends share.
func echo(t *testing.T, keyboard *os.File) bool {
	state, err := unix.IoctlGetTermios(int(keyboard.Fd()), unix.TCGETS)
	if err != nil {
		t.Error(err)
		return false
	}
	return state.Lflag&unix.ECHO != 0
}

func terminal(t *testing.T) (keyboard, tty *os.File) {
	t.Helper()
	keyboard, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skip("no pseudo terminals here")
	}
	t.Cleanup(func() { _ = keyboard.Close() })
	if err := unix.IoctlSetPointerInt(int(keyboard.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	number, err := unix.IoctlGetInt(int(keyboard.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tty.Close() })
	return keyboard, tty
}
