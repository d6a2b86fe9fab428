package keyclient

import (
	"fmt"
	"log/slog"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"voldek/internal/exit"
	"voldek/keyclient/cluster"
	"voldek/keyclient/file"
)

// URI is a KMS or storage URI (kms://KIND?…, storage://KIND?…). Its parameters may be secrets: every way of printing it
// shows Redact of it.
type URI string

// String, GoString, MarshalText and LogValue print the URI redacted.
func (u URI) String() string               { return Redact(string(u)) }
func (u URI) GoString() string             { return Redact(string(u)) }
func (u URI) MarshalText() ([]byte, error) { return []byte(Redact(string(u))), nil }
func (u URI) LogValue() slog.Value         { return slog.StringValue(Redact(string(u))) }

var kindForm = regexp.MustCompile(`^(kms|storage)://([a-z0-9-]{1,32})$`)

// shown are the parameters whose values are places, not secrets; withheld those whose name may be shown.
var (
	shown    = []string{"keyFile", "keyCredential", "saltFile", "saltCredential"}
	withheld = []string{"key", "salt"}
)

// Redact returns the URI with everything but its kind and places of secrets replaced by [secret], whether it can be
// parsed or not.
func Redact(uri string) string {
	head, query, found := strings.Cut(uri, "?")
	if !kindForm.MatchString(head) {
		return "[secret]"
	}
	if !found {
		return head
	}
	parts := strings.Split(query, "&")
	for i, part := range parts {
		name, _, _ := strings.Cut(part, "=")
		switch {
		case slices.Contains(withheld, name):
			parts[i] = name + "=[secret]"
		case !slices.Contains(shown, name):
			parts[i] = "[secret]"
		}
	}
	return head + "?" + strings.Join(parts, "&")
}

// parseURI splits a URI of the scheme "kms" or "storage". The parameters are decoded once. No error repeats any of it,
// since net/url quotes what it cannot parse.
func parseURI(scheme string, u URI) (kind string, params url.Values, err error) {
	head, query, _ := strings.Cut(string(u), "?")
	m := kindForm.FindStringSubmatch(head)
	if m == nil || m[1] != scheme {
		return "", nil, badRef("not a URI of the form %s://KIND?name=value&…", scheme)
	}
	if strings.Contains(query, "#") {
		return "", nil, badRef("a URI has no #fragment; write # as %%23")
	}
	params, err = url.ParseQuery(query)
	if err != nil {
		return "", nil, badRef("the parameters after ? are not name=value&…, percent-encoded")
	}
	return m[2], params, nil
}

// parseCluster reads kms://cluster-kms?key=B64URL&salt=B64URL, each also as NAMEFile=PATH or NAMECredential=NAME.
func parseCluster(params url.Values) (cluster.KMS, error) {
	for name, values := range params {
		if !slices.Contains(shown, name) && !slices.Contains(withheld, name) {
			return cluster.KMS{}, badRef("cluster-kms has the parameters key and salt, each also as …File or …Credential, and no other")
		}
		if len(values) != 1 {
			return cluster.KMS{}, badRef("the parameter %s stands twice", name)
		}
	}
	master, err := secretParam(params, "key")
	if err != nil {
		return cluster.KMS{}, err
	}
	salt, err := secretParam(params, "salt")
	if err != nil {
		return cluster.KMS{}, err
	}
	kms := cluster.KMS{Master: master, Salt: salt}
	return kms, kms.Check()
}

// secretParam returns one secret parameter in whichever of its three forms it is given.
func secretParam(params url.Values, name string) (p cluster.Param, err error) {
	given := 0
	if params.Has(name) {
		given++
		p.Inline = params.Get(name)
		if strings.Contains(p.Inline, " ") {
			return p, badRef("%s holds a space; a plus sign in a URI is written %%2B", name)
		}
	}
	if params.Has(name + "File") {
		given++
		p.Source = file.Source("file:" + params.Get(name+"File"))
	}
	if params.Has(name + "Credential") {
		given++
		p.Source = file.Source("credential:" + params.Get(name+"Credential"))
	}
	if given != 1 {
		return p, badRef("give exactly one of %s, %sFile and %sCredential", name, name, name)
	}
	return p, nil
}

// parseKMS returns the key service behind a kms and a storage URI. An empty storage is storage://no-store.
func parseKMS(kms, storage URI) (cluster.KMS, error) {
	kind, params, err := parseURI("kms", kms)
	if err != nil {
		return cluster.KMS{}, fmt.Errorf("kms: %w", err)
	}
	if kind != "cluster-kms" {
		return cluster.KMS{}, exit.New(exit.Usage, "kms: this version knows kms://cluster-kms only")
	}
	service, err := parseCluster(params)
	if err != nil {
		return cluster.KMS{}, fmt.Errorf("kms: %w", err)
	}
	if storage == "" {
		return service, nil
	}
	kind, params, err = parseURI("storage", storage)
	if err != nil {
		return cluster.KMS{}, fmt.Errorf("storage: %w", err)
	}
	if kind != "no-store" || len(params) != 0 {
		return cluster.KMS{}, exit.New(exit.Usage, "storage: cluster-kms derives its keys and goes with storage://no-store only")
	}
	return service, nil
}
