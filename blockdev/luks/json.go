package luks

import (
	"errors"
	"fmt"
	"strconv"
	"unicode/utf16"
	"unicode/utf8"
)

// A strict reader of JSON text (RFC 8259), since LUKS2 metadata is read by C programs too and both must see the same:
// names are case-sensitive, duplicates are refused at every level, as are invalid UTF-8, lone surrogates, NUL in a
// string, deep nesting and a number of values that no real header has.

const (
	maxDepth  = 16
	maxValues = 16384 // 32 key slots, 32 digests and their segments are under 1500; this bounds the memory
)

type kind int

const (
	objectKind kind = iota
	arrayKind
	stringKind
	numberKind
	wordKind // true, false, null
)

func (k kind) String() string {
	return [...]string{"an object", "an array", "a string", "a number", "true, false or null"}[k]
}

// node is one JSON value.
type node struct {
	kind  kind
	text  string   // a string decoded, a number or word as written
	names []string // an object's names; names[i] belongs to items[i]
	items []*node
	raw   []byte // as written
}

// member returns the value of a name in an object, nil if there is none.
func (n *node) member(name string) *node {
	for i, have := range n.names {
		if have == name {
			return n.items[i]
		}
	}
	return nil
}

// parseJSON returns the value that text consists of.
func parseJSON(text []byte) (*node, error) {
	p := &parser{text: text}
	p.space()
	n, err := p.value(1)
	if err != nil {
		return nil, fmt.Errorf("at byte %d: %w", p.at, err)
	}
	p.space()
	if p.at != len(text) {
		return nil, fmt.Errorf("at byte %d: text after the end", p.at)
	}
	return n, nil
}

type parser struct {
	text   []byte
	at     int
	values int
}

var errShort = errors.New("ends in the middle")

func (p *parser) space() {
	for p.at < len(p.text) {
		switch p.text[p.at] {
		case ' ', '\t', '\n', '\r':
			p.at++
		default:
			return
		}
	}
}

// peek returns the next byte, 0 at the end (a NUL is never valid either).
func (p *parser) peek() byte {
	if p.at < len(p.text) {
		return p.text[p.at]
	}
	return 0
}

func (p *parser) value(depth int) (*node, error) {
	if depth > maxDepth {
		return nil, fmt.Errorf("nested deeper than %d", maxDepth)
	}
	if p.values++; p.values > maxValues {
		return nil, fmt.Errorf("more than %d values", maxValues)
	}
	n := &node{}
	start := p.at
	var err error
	switch c := p.peek(); {
	case c == '{':
		n.kind = objectKind
		err = p.list('}', func() error { return p.pair(n, depth) })
		if err == nil {
			err = p.noDuplicates(n)
		}
	case c == '[':
		n.kind = arrayKind
		err = p.list(']', func() error { return p.item(n, depth) })
	case c == '"':
		n.kind = stringKind
		n.text, err = p.quoted()
	case c == '-' || digit(c):
		n.kind = numberKind
		n.text, err = p.number()
	default:
		n.kind = wordKind
		n.text, err = p.word()
	}
	n.raw = p.text[start:p.at]
	return n, err
}

// list reads what stands between brackets, one member at a time, to the closing byte.
func (p *parser) list(closing byte, member func() error) error {
	p.at++
	p.space()
	if p.peek() == closing {
		p.at++
		return nil
	}
	for {
		p.space()
		if err := member(); err != nil {
			return err
		}
		p.space()
		switch p.peek() {
		case closing:
			p.at++
			return nil
		case ',':
			p.at++
		default:
			return p.unexpected()
		}
	}
}

func (p *parser) pair(n *node, depth int) error {
	if p.peek() != '"' {
		return p.unexpected()
	}
	name, err := p.quoted()
	if err != nil {
		return err
	}
	p.space()
	if p.peek() != ':' {
		return p.unexpected()
	}
	p.at++
	p.space()
	n.names = append(n.names, name)
	return p.item(n, depth)
}

func (p *parser) item(n *node, depth int) error {
	v, err := p.value(depth + 1)
	n.items = append(n.items, v)
	return err
}

func (p *parser) noDuplicates(n *node) error {
	seen := make(map[string]bool, len(n.names))
	for _, name := range n.names {
		if seen[name] {
			return fmt.Errorf("name %q appears twice in one object", name)
		}
		seen[name] = true
	}
	return nil
}

func (p *parser) unexpected() error {
	if p.at == len(p.text) {
		return errShort
	}
	return fmt.Errorf("unexpected byte %q", p.text[p.at])
}

func (p *parser) word() (string, error) {
	for _, word := range []string{"true", "false", "null"} {
		if rest := p.text[p.at:]; len(rest) >= len(word) && string(rest[:len(word)]) == word {
			p.at += len(word)
			return word, nil
		}
	}
	return "", p.unexpected()
}

func digit(c byte) bool { return '0' <= c && c <= '9' }

// number reads a number of the full grammar; what may be used of it is decided by who needs it.
func (p *parser) number() (string, error) {
	start := p.at
	if p.peek() == '-' {
		p.at++
	}
	if p.peek() == '0' {
		p.at++
	} else if err := p.digits(); err != nil {
		return "", err
	}
	if p.peek() == '.' {
		p.at++
		if err := p.digits(); err != nil {
			return "", err
		}
	}
	if c := p.peek(); c == 'e' || c == 'E' {
		p.at++
		if c := p.peek(); c == '+' || c == '-' {
			p.at++
		}
		if err := p.digits(); err != nil {
			return "", err
		}
	}
	return string(p.text[start:p.at]), nil
}

func (p *parser) digits() error {
	if !digit(p.peek()) {
		return p.unexpected()
	}
	for digit(p.peek()) {
		p.at++
	}
	return nil
}

func (p *parser) quoted() (string, error) {
	p.at++
	start := p.at
	var decoded []byte
	for p.at < len(p.text) {
		switch c := p.text[p.at]; {
		case c == '"':
			decoded = append(decoded, p.text[start:p.at]...)
			p.at++
			return string(decoded), nil
		case c < ' ':
			return "", p.unexpected()
		case c == '\\':
			decoded = append(decoded, p.text[start:p.at]...)
			r, err := p.escape()
			if err != nil {
				return "", err
			}
			decoded = utf8.AppendRune(decoded, r)
			start = p.at
		default:
			r, n := utf8.DecodeRune(p.text[p.at:])
			if r == utf8.RuneError && n == 1 {
				return "", errors.New("not valid UTF-8")
			}
			p.at += n
		}
	}
	return "", errShort
}

// escape reads a backslash and what it escapes.
func (p *parser) escape() (rune, error) {
	p.at++
	c := p.peek()
	p.at++
	switch c {
	case '"', '\\', '/':
		return rune(c), nil
	case 'b':
		return '\b', nil
	case 'f':
		return '\f', nil
	case 'n':
		return '\n', nil
	case 'r':
		return '\r', nil
	case 't':
		return '\t', nil
	case 'u':
		return p.unicodeEscape()
	}
	p.at--
	return 0, p.unexpected()
}

// unicodeEscape reads the hex digits of \uXXXX, and the second half of a surrogate pair.
func (p *parser) unicodeEscape() (rune, error) {
	r, err := p.hex4()
	if err != nil {
		return 0, err
	}
	if utf16.IsSurrogate(r) {
		if rest := p.text[p.at:]; len(rest) < 2 || rest[0] != '\\' || rest[1] != 'u' {
			return 0, errors.New("lone surrogate")
		}
		p.at += 2
		low, err := p.hex4()
		if err != nil {
			return 0, err
		}
		if r = utf16.DecodeRune(r, low); r == utf8.RuneError {
			return 0, errors.New("lone surrogate")
		}
	}
	if r == 0 {
		return 0, errors.New("NUL in a string") // a C reader would end the string there
	}
	return r, nil
}

func (p *parser) hex4() (rune, error) {
	if len(p.text)-p.at < 4 {
		return 0, errShort
	}
	v, err := strconv.ParseUint(string(p.text[p.at:p.at+4]), 16, 16)
	if err != nil {
		return 0, errors.New("bad \\u escape")
	}
	p.at += 4
	return rune(v), nil
}
