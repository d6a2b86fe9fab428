// Package keyclient turns a key reference into the passphrase of a LUKS key slot: it parses references and the
// configuration of key services, asks the service (one room below for each kind), and brings the key bytes into the form
// the key slot expects. It does not know disks or headers.
package keyclient

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strings"

	"voldek/internal/exit"
	"voldek/internal/secret"
	"voldek/keyclient/barbican"
	"voldek/keyclient/call"
	"voldek/keyclient/cluster"
	"voldek/keyclient/file"
)

// What a key service can answer other than a key. The text around them names the service's address and request id.
var (
	ErrNoKey       = call.ErrNoKey       // 13: unknown, deleted, expired, or without a payload
	ErrDenied      = call.ErrDenied      // 14: login or access refused; the text says how to grant it
	ErrUnreached   = call.ErrUnreached   // 15: no usable answer until the context's deadline
	ErrContentType = call.ErrContentType // 1: an answer that is no key
)

// Volume is what a key service may need to know of the volume.
type Volume struct {
	UUID string // the LUKS UUID in lower case; "" where there is none
	Name string // the name it is attached as; "" where there is none
}

// Client fetches keys.
type Client interface {
	// Fetch returns the LUKS passphrase that ref leads to. The caller wipes it. It retries what may heal until ctx ends,
	// so ctx should have a deadline unless waiting for ever is meant.
	Fetch(ctx context.Context, ref Ref, v Volume) (*secret.Buffer, error)
}

// Clients fetches keys from the services of one configuration. It is safe for concurrent use; all fetches from one
// Barbican share one login.
type Clients struct {
	config   Config
	barbican map[string]*barbican.Client
	kms      map[string]cluster.KMS
	stdin    io.Reader
	ask      func(ctx context.Context, prompt string) (*secret.Buffer, error)
	dial     call.Dial
}

var _ Client = (*Clients)(nil)

// Option changes what New makes.
type Option func(*Clients)

// WithStdin is where the reference "-" reads, once and to its end. Without it "-" is a usage error, as in the daemon.
func WithStdin(r io.Reader) Option { return func(c *Clients) { c.stdin = r } }

// WithAsk is how the reference "ask" asks for a passphrase; see Ask. Without it "ask" is a usage error, as in the daemon.
func WithAsk(ask func(ctx context.Context, prompt string) (*secret.Buffer, error)) Option {
	return func(c *Clients) { c.ask = ask }
}

// WithDial replaces the network, for tests.
func WithDial(dial func(ctx context.Context, network, address string) (net.Conn, error)) Option {
	return func(c *Clients) { c.dial = dial }
}

// New checks the configuration. It uses no network and reads no secret before the first Fetch.
func New(config Config, options ...Option) (*Clients, error) {
	if err := config.Check(); err != nil {
		return nil, err
	}
	c := &Clients{config: config, barbican: map[string]*barbican.Client{}, kms: map[string]cluster.KMS{}}
	for _, option := range options {
		option(c)
	}
	for name, s := range config.Services {
		switch s.Type {
		case TypeBarbican:
			c.barbican[name] = barbican.New(s.barbican(), call.Policy{CAFile: s.CAFile, Insecure: s.Insecure, Dial: c.dial})
		case TypeKMS:
			kms, err := parseKMS(s.KMS, s.Storage)
			if err != nil {
				return nil, fmt.Errorf("service.%s: %w", name, err)
			}
			c.kms[name] = kms
		}
	}
	return c, nil
}

// Close gives up the connections that wait for reuse. Fetches may still follow.
func (c *Clients) Close() {
	for _, b := range c.barbican {
		b.Close()
	}
}

// Fetch implements Client.
func (c *Clients) Fetch(ctx context.Context, ref Ref, v Volume) (*secret.Buffer, error) {
	key, form, err := c.fetch(ctx, ref, v)
	if err != nil {
		return nil, err
	}
	if ref.As != "" {
		form = ref.As
	}
	return inForm(key, form)
}

// fetch returns the key bytes and the form they take where the reference does not say another.
func (c *Clients) fetch(ctx context.Context, ref Ref, v Volume) (key *secret.Buffer, form string, err error) {
	switch ref.Scheme {
	case SchemeBarbican:
		return c.fromBarbican(ctx, ref)
	case SchemeKMS:
		key, err = c.fromKMS(ref, v)
	case SchemeFile:
		key, err = file.Read(ref.Path)
	case SchemeCredential:
		key, err = file.Credential(ref.ID)
	case SchemeStdin:
		if c.stdin == nil {
			return nil, "", badRef("the key reference - needs a standard input, which a daemon has not")
		}
		key, err = readStdin(c.stdin)
	case SchemeAsk:
		if c.ask == nil {
			return nil, "", badRef("the key reference ask needs a terminal, which a daemon has not")
		}
		key, err = c.ask(ctx, prompt(v))
	case SchemeToken:
		err = badRef("the key reference token stands for the one in the volume's LUKS2 header; there is none here")
	default:
		err = badRef("the key reference has no known scheme")
	}
	return key, AsRaw, err
}

func (c *Clients) fromBarbican(ctx context.Context, ref Ref) (*secret.Buffer, string, error) {
	name, err := c.service(ref, TypeBarbican)
	if err != nil {
		return nil, "", err
	}
	s, err := c.barbican[name].Fetch(ctx, ref.ID)
	if err != nil {
		return nil, "", err
	}
	// Nova, Cinder and os-brick use the lower-case hexadecimal of a key, and a passphrase as it is.
	if s.Type == barbican.TypePassphrase {
		return s.Payload, AsRaw, nil
	}
	return s.Payload, AsHex, nil
}

func (c *Clients) fromKMS(ref Ref, v Volume) (*secret.Buffer, error) {
	name, err := c.service(ref, TypeKMS)
	if err != nil {
		return nil, err
	}
	id := ref.ID
	if id == "" {
		id = strings.ToLower(v.UUID)
	}
	if !isName(id) {
		return nil, badRef("kms:%s names no key id, and the volume has no LUKS UUID to take for it", ref.Service)
	}
	key, err := c.kms[name].Derive("key-" + id)
	if err != nil {
		return nil, fmt.Errorf("service.%s: %w", name, err)
	}
	return key, nil
}

// service returns the service of the type that the reference names, else the default one, else the only one.
func (c *Clients) service(ref Ref, kind string) (string, error) {
	if ref.Service != "" {
		if s, ok := c.config.Services[ref.Service]; !ok || s.Type != kind {
			return "", fmt.Errorf("%s: %w: [service.%s] with type = %q", ref, errNoService, ref.Service, kind)
		}
		return ref.Service, nil
	}
	var names []string
	for _, name := range slices.Sorted(maps.Keys(c.config.Services)) {
		s := c.config.Services[name]
		if s.Type != kind {
			continue
		}
		if s.Default {
			return name, nil
		}
		names = append(names, name)
	}
	switch len(names) {
	case 0:
		return "", fmt.Errorf("%s: %w: none has type = %q", ref, errNoService, kind)
	case 1:
		return names[0], nil
	}
	return "", badRef("%s: which service? write %s@NAME, or set default = true in one of: %s", ref, ref, strings.Join(names, ", "))
}

// inForm takes over key and returns the passphrase made of it.
func inForm(key *secret.Buffer, form string) (*secret.Buffer, error) {
	var size int
	switch form {
	case AsRaw:
		return key, nil
	case AsHex:
		size = hex.EncodedLen(key.Len())
	case AsBase64:
		size = base64.StdEncoding.EncodedLen(key.Len())
	default:
		key.Wipe()
		return nil, exit.New(exit.Usage, "a key has the form hex, raw or base64")
	}
	defer key.Wipe()
	passphrase, err := secret.New(size)
	if err != nil {
		return nil, err
	}
	if form == AsHex {
		hex.Encode(passphrase.Bytes(), key.Bytes())
	} else {
		base64.StdEncoding.Encode(passphrase.Bytes(), key.Bytes())
	}
	return passphrase, nil
}

func prompt(v Volume) string {
	if v.Name != "" {
		return "Passphrase of " + v.Name + ": "
	}
	return "Passphrase: "
}
