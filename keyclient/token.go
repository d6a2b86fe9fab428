package keyclient

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"

	"voldek/internal/exit"
)

// TokenType is the "type" of the LUKS2 token that holds a reference.
const TokenType = "voldek"

// ErrBadToken is a LUKS2 token that is damaged or says what a token may not say.
var ErrBadToken = exit.New(exit.BadHeader, "the voldek token is damaged or refused")

const maxToken = 4096 // bytes

// RefFromToken reads the reference out of a LUKS2 token:
//
//	{"type":"voldek","keyslots":["0"],"ref":"barbican:UUID@SERVICE"}
//
// Whoever can write the disk writes the token, so it may only point at a key of a service that the local configuration
// names (barbican:, kms:), never at a file, a credential or an address. Fields must be these three, spelt so, each once.
func RefFromToken(token []byte) (Ref, error) {
	if len(token) > maxToken {
		return Ref{}, fmt.Errorf("%w: longer than %d bytes", ErrBadToken, maxToken)
	}
	text, err := tokenRef(token)
	if err != nil {
		return Ref{}, fmt.Errorf("%w: %w", ErrBadToken, err)
	}
	r, err := ParseRef(text)
	if err != nil {
		return Ref{}, fmt.Errorf("%w: ref is no key reference", ErrBadToken)
	}
	if r.Scheme != SchemeBarbican && r.Scheme != SchemeKMS {
		return Ref{}, fmt.Errorf("%w: ref is of a scheme other than barbican and kms", ErrBadToken)
	}
	return r, nil
}

// tokenRef walks the object itself: encoding/json would match names in any case and take the last of two equal ones.
func tokenRef(token []byte) (ref string, err error) {
	d := json.NewDecoder(bytes.NewReader(token))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return "", errors.New("not a JSON object")
	}
	seen := map[string]bool{}
	for d.More() {
		t, err := d.Token()
		if err != nil {
			return "", errors.New("broken JSON")
		}
		field := t.(string)
		if seen[field] {
			return "", errors.New("a field stands twice")
		}
		seen[field] = true
		switch field {
		case "type":
			var kind string
			if err := d.Decode(&kind); err != nil || kind != TokenType {
				return "", errors.New("type is not voldek")
			}
		case "keyslots":
			if err := checkKeyslots(d); err != nil {
				return "", err
			}
		case "ref":
			if err := d.Decode(&ref); err != nil {
				return "", errors.New("ref is not a string")
			}
		default:
			return "", errors.New("an unknown field")
		}
	}
	if _, err := d.Token(); err != nil {
		return "", errors.New("broken JSON")
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return "", errors.New("more than one JSON object")
	}
	if !seen["type"] || !seen["keyslots"] || !seen["ref"] {
		return "", errors.New("type, keyslots or ref is missing")
	}
	return ref, nil
}

func checkKeyslots(d *json.Decoder) error {
	var slots []string
	if err := d.Decode(&slots); err != nil {
		return errors.New("keyslots is not a list of strings")
	}
	for _, s := range slots {
		if n, err := strconv.Atoi(s); err != nil || n < 0 || n > 31 || strconv.Itoa(n) != s {
			return errors.New("keyslots names no key slot")
		}
	}
	return nil
}
