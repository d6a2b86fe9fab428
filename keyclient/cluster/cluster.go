// Package cluster is the embedded key service: it derives each key from one master key, as Constellation's cluster-kms
// does. It does not store anything and does not use the network.
package cluster

import (
	"bytes"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/base64"
	"fmt"

	"voldek/internal/exit"
	"voldek/internal/secret"
	"voldek/keyclient/file"
)

const (
	// KeySize is the length of a derived key in bytes.
	KeySize = 32
	// MinMaster and MinSalt are the least lengths in bytes of what the keys are derived from.
	MinMaster = 16
	MinSalt   = 32
)

// Param is one parameter of the URI: its base64url text itself, or where that text is.
type Param struct {
	Inline string
	Source file.Source
}

// KMS derives keys. It is safe for concurrent use.
type KMS struct{ Master, Salt Param }

// Check reports inline parameters that are no base64url or too short. Files and credentials are seen first by Derive.
func (k KMS) Check() error {
	for _, p := range []struct {
		name string
		p    Param
		min  int
	}{{"key", k.Master, MinMaster}, {"salt", k.Salt, MinSalt}} {
		if p.p.Source != "" {
			if err := p.p.Source.Check(); err != nil {
				return fmt.Errorf("%s: %w", p.name, err)
			}
			continue
		}
		b, err := p.p.read(p.name, p.min)
		if err != nil {
			return err
		}
		b.Wipe()
	}
	return nil
}

// Derive returns the key of the object id: HKDF-SHA256 with the id as its info (RFC 5869). The caller wipes it.
func (k KMS) Derive(objectID string) (*secret.Buffer, error) {
	master, err := k.Master.read("key", MinMaster)
	if err != nil {
		return nil, err
	}
	defer master.Wipe()
	salt, err := k.Salt.read("salt", MinSalt)
	if err != nil {
		return nil, err
	}
	defer salt.Wipe()
	key, err := hkdf.Key(sha256.New, master.Bytes(), salt.Bytes(), objectID, KeySize)
	if err != nil {
		return nil, fmt.Errorf("derive %s: %w", objectID, err)
	}
	return secret.FromBytes(key)
}

func (p Param) read(name string, least int) (*secret.Buffer, error) {
	var text *secret.Buffer
	var err error
	if p.Source != "" {
		text, err = p.Source.Read()
	} else {
		text, err = secret.FromBytes([]byte(p.Inline))
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	defer text.Wipe()
	b, err := decode(text.Bytes())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if b.Len() < least {
		defer b.Wipe()
		return nil, exit.New(exit.Usage, fmt.Sprintf("%s: %d bytes, at least %d are needed", name, b.Len(), least))
	}
	return b, nil
}

// decode reads base64url with or without padding.
func decode(text []byte) (*secret.Buffer, error) {
	if n := len(text); n%4 == 0 {
		for range 2 {
			if n > 0 && text[n-1] == '=' {
				n--
			}
		}
		text = text[:n]
	}
	room := make([]byte, base64.RawURLEncoding.DecodedLen(len(text)))
	n, err := base64.RawURLEncoding.Strict().Decode(room, text)
	if err != nil || bytes.ContainsAny(text, "\r\n") {
		secret.Wipe(room)
		return nil, exit.New(exit.Usage, "not base64url (RFC 4648 section 5)")
	}
	return secret.FromBytes(room[:n])
}
