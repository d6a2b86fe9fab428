package keyclient

import (
	"fmt"
	"regexp"
	"strings"

	"voldek/internal/exit"
)

// The schemes of a reference. The last three have nothing behind them.
const (
	SchemeBarbican   = "barbican"
	SchemeKMS        = "kms"
	SchemeFile       = "file"
	SchemeCredential = "credential"
	SchemeStdin      = "-"
	SchemeAsk        = "ask"
	SchemeToken      = "token"
)

// The forms in which key bytes become the LUKS passphrase. The zero value is the default of the scheme.
const (
	AsHex    = "hex"    // lower-case hexadecimal, no newline
	AsRaw    = "raw"    // the bytes as they are
	AsBase64 = "base64" // standard alphabet, padded, no newline
)

// Ref is a key reference: where the key of a volume is. It never holds the key.
//
//	barbican:UUID[@SERVICE]   kms:SERVICE[/KEY-ID]   file:PATH   credential:NAME   -   ask   token
//
// each with ?as=hex|raw|base64 at its end, where wanted.
type Ref struct {
	Scheme  string
	ID      string // barbican: the secret's UUID in lower case; kms: the key id or ""; credential: its name
	Service string // the [service.NAME] of the configuration; "": the default one
	Path    string // file
	As      string // AsHex, AsRaw, AsBase64 or ""
}

const maxRef = 4096 + 256 // bytes; a path may have 4096

var (
	uuidForm = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)
	nameForm = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,64}$`)
)

// known are words before a colon that may be repeated in an error; anything else may be a passphrase put where a
// reference belongs.
var known = map[string]bool{"vault": true, "kmip": true, "http": true, "https": true, "aws": true, "azure": true,
	"gcp": true, "stackit": true, "pkcs11": true, "tpm2": true, "keyring": true, "secret": true, "storage": true}

const forms = "barbican:UUID[@SERVICE], kms:SERVICE[/KEY-ID], file:PATH, credential:NAME, -, ask or token"

// ParseRef parses a reference. Its errors carry exit.Usage and repeat nothing of s that could be a secret.
func ParseRef(s string) (Ref, error) {
	if len(s) > maxRef {
		return Ref{}, badRef("a key reference has at most %d bytes", maxRef)
	}
	body, as, err := cutForm(s)
	if err != nil {
		return Ref{}, err
	}
	r := Ref{As: as}
	switch body {
	case SchemeStdin, SchemeAsk, SchemeToken:
		r.Scheme = body
		return r, nil
	}
	scheme, rest, found := strings.Cut(body, ":")
	if !found {
		return Ref{}, noScheme(body)
	}
	r.Scheme = scheme
	switch scheme {
	case SchemeBarbican:
		err = r.parseBarbican(rest)
	case SchemeKMS:
		err = r.parseKMS(rest)
	case SchemeFile:
		err = r.parseFile(rest)
	case SchemeCredential:
		err = r.parseCredential(rest)
	default:
		return Ref{}, unknownScheme(scheme)
	}
	if err != nil {
		return Ref{}, err
	}
	return r, nil
}

// cutForm takes ?as=FORM off the end. The last one counts, so a path may hold a question mark.
func cutForm(s string) (body, as string, err error) {
	i := strings.LastIndex(s, "?as=")
	if i < 0 {
		return s, "", nil
	}
	switch as = s[i+len("?as="):]; as {
	case AsHex, AsRaw, AsBase64:
		return s[:i], as, nil
	}
	return "", "", badRef("after ?as= comes hex, raw or base64")
}

func (r *Ref) parseBarbican(rest string) error {
	id, service, named := strings.Cut(rest, "@")
	r.ID, r.Service = strings.ToLower(id), service
	if !uuidForm.MatchString(r.ID) {
		return badRef("barbican: wants the secret's UUID, as in barbican:6c9a2f0e-1111-4222-8333-444455556666")
	}
	if named && !isName(service) {
		return badName("the service after @")
	}
	return nil
}

func (r *Ref) parseKMS(rest string) error {
	service, id, named := strings.Cut(rest, "/")
	r.Service, r.ID = service, id
	if strings.HasPrefix(rest, "//") {
		return badRef("a KMS URI belongs into the configuration, as kms = in a [service.NAME]; the reference is kms:NAME")
	}
	if !isName(service) {
		return badName("the service after kms:")
	}
	if named && !isName(id) {
		return badName("the key id after the slash")
	}
	return nil
}

func (r *Ref) parseFile(rest string) error {
	r.Path = rest
	if rest == "" || len(rest) > 4096 || strings.ContainsAny(rest, "\x00\n\r") {
		return badRef("file: wants a path of 1 to 4096 bytes without line breaks")
	}
	return nil
}

func (r *Ref) parseCredential(rest string) error {
	r.ID = rest
	if !isName(rest) {
		return badName("the credential's name")
	}
	return nil
}

// String returns the reference as ParseRef reads it.
func (r Ref) String() string {
	s := r.Scheme
	switch r.Scheme {
	case SchemeBarbican:
		s += ":" + r.ID
		if r.Service != "" {
			s += "@" + r.Service
		}
	case SchemeKMS:
		s += ":" + r.Service
		if r.ID != "" {
			s += "/" + r.ID
		}
	case SchemeFile:
		s += ":" + r.Path
	case SchemeCredential:
		s += ":" + r.ID
	}
	if r.As != "" {
		s += "?as=" + r.As
	}
	return s
}

// FromCaller reports whether the key is with whoever asks, on its standard input or at its terminal, where no daemon can
// fetch it.
func (r Ref) FromCaller() bool { return r.Scheme == SchemeStdin || r.Scheme == SchemeAsk }

// MarshalText and UnmarshalText let a Ref stand in the configuration and in JSON as its text.
func (r Ref) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText is ParseRef.
func (r *Ref) UnmarshalText(text []byte) (err error) {
	*r, err = ParseRef(string(text))
	return err
}

// isName reports whether s may name a service, a key or a credential. The two names of directories are none.
func isName(s string) bool { return nameForm.MatchString(s) && s != "." && s != ".." }

func badRef(format string, args ...any) error {
	return exit.New(exit.Usage, fmt.Sprintf(format, args...))
}

func badName(what string) error {
	return badRef("%s has 1 to 64 letters, digits, dots, dashes or underscores", what)
}

func noScheme(s string) error {
	if lower := strings.ToLower(s); uuidForm.MatchString(lower) {
		return badRef("%q names no key service; did you mean barbican:%s", s, lower)
	}
	if strings.HasPrefix(s, "/") {
		return badRef("the key reference is a path; did you mean file:PATH")
	}
	return badRef("the key reference names no key service; write %s", forms)
}

func unknownScheme(scheme string) error {
	if known[scheme] {
		return badRef("%s: is no kind of key reference here; write %s", scheme, forms)
	}
	return badRef("the key reference names no known key service; write %s", forms)
}
