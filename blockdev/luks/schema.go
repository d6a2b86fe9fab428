package luks

import (
	"encoding/base64"
	"reflect"
	"slices"
	"strconv"
	"strings"
)

// decode fills the variable that v is from a JSON value, strictly, and names the field in each error. The Go type says
// what is wanted:
//
//	struct          an object with exactly the fields of the "luks" tags; ",optional" may be missing
//	map[int]T       an object named by canonical decimal ids below maxIDs
//	[]int           an array of such ids, as strings, none twice
//	[]string        an array of strings
//	string          a string
//	int             a non-negative integer below 2^31, as C readers take it
//	uint64          a decimal string, as the specification writes 64-bit numbers
//	[]byte          a base64 string
//	*node           anything, decoded later
func decode(n *node, field string, v reflect.Value) error {
	switch into := v.Addr().Interface().(type) {
	case **node:
		*into = n
		return nil
	case *string:
		if n.kind != stringKind {
			return bad(field, "%s where a string belongs", n.kind)
		}
		*into = n.text
		return nil
	case *int:
		x, err := strconv.ParseUint(n.text, 10, 31)
		if n.kind != numberKind || err != nil {
			return bad(field, "not a non-negative integer below 2^31")
		}
		*into = int(x)
		return nil
	case *uint64:
		x, err := strconv.ParseUint(n.text, 10, 64)
		if n.kind != stringKind || err != nil || strconv.FormatUint(x, 10) != n.text {
			return bad(field, "not a 64-bit number as a decimal string")
		}
		*into = x
		return nil
	case *[]byte:
		return decodeBase64(n, field, into)
	case *[]int:
		return decodeIDs(n, field, into)
	case *[]string:
		return decodeStrings(n, field, into)
	}
	if v.Kind() == reflect.Map {
		return decodeMap(n, field, v)
	}
	return decodeStruct(n, field, v)
}

const maxIDs = 32 // key slots, tokens, segments and digests: LUKS2_KEYSLOTS_MAX and its like

func decodeStruct(n *node, field string, v reflect.Value) error {
	if n.kind != objectKind {
		return bad(field, "%s where an object belongs", n.kind)
	}
	var known []string
	for i := range v.NumField() {
		name, option, _ := strings.Cut(v.Type().Field(i).Tag.Get("luks"), ",")
		known = append(known, name)
		m := n.member(name)
		if m == nil && option == "optional" {
			continue
		}
		if m == nil {
			return bad(join(field, name), "missing")
		}
		if err := decode(m, join(field, name), v.Field(i)); err != nil {
			return err
		}
	}
	for _, name := range n.names {
		if !slices.Contains(known, name) {
			return bad(join(field, printable(name)), "unknown field")
		}
	}
	return nil
}

func decodeMap(n *node, field string, v reflect.Value) error {
	if n.kind != objectKind {
		return bad(field, "%s where an object belongs", n.kind)
	}
	v.Set(reflect.MakeMap(v.Type()))
	for i, name := range n.names {
		id, ok := parseID(name)
		if !ok {
			return bad(join(field, printable(name)), "not a number below %d", maxIDs)
		}
		item := reflect.New(v.Type().Elem()).Elem()
		if err := decode(n.items[i], join(field, name), item); err != nil {
			return err
		}
		v.SetMapIndex(reflect.ValueOf(id), item)
	}
	return nil
}

func decodeBase64(n *node, field string, into *[]byte) error {
	raw, err := base64.StdEncoding.Strict().DecodeString(n.text)
	// Go's decoder skips line ends; encoding again shows them.
	if n.kind != stringKind || err != nil || base64.StdEncoding.EncodeToString(raw) != n.text {
		return bad(field, "not a base64 string")
	}
	*into = raw
	return nil
}

func decodeIDs(n *node, field string, into *[]int) error {
	var names []string
	if err := decodeStrings(n, field, &names); err != nil {
		return err
	}
	*into = make([]int, 0, min(len(names), maxIDs))
	for _, name := range names {
		id, ok := parseID(name)
		if !ok {
			return bad(field, "%q is not a number below %d", printable(name), maxIDs)
		}
		if slices.Contains(*into, id) {
			return bad(field, "%d appears twice", id)
		}
		*into = append(*into, id)
	}
	return nil
}

func decodeStrings(n *node, field string, into *[]string) error {
	if n.kind != arrayKind {
		return bad(field, "%s where an array belongs", n.kind)
	}
	*into = make([]string, 0, len(n.items))
	for _, item := range n.items {
		if item.kind != stringKind {
			return bad(field, "%s where a string belongs", item.kind)
		}
		*into = append(*into, item.text)
	}
	return nil
}

// parseID accepts the one canonical spelling of an id: no sign, no leading zero.
func parseID(name string) (int, bool) {
	id, err := strconv.Atoi(name)
	return id, err == nil && id >= 0 && id < maxIDs && strconv.Itoa(id) == name
}

func join(field, name string) string {
	if field == "" {
		return name
	}
	return field + "." + name
}
