package keyclient_test

import (
	"encoding/json"
	"strings"
	"testing"

	"voldek/internal/exit"
	"voldek/keyclient"
)

const uuid = "6c9a2f0e-1111-4222-8333-444455556666"

func TestParseRef(t *testing.T) {
	for s, want := range map[string]keyclient.Ref{
		"barbican:" + uuid:                   {Scheme: "barbican", ID: uuid},
		"barbican:" + uuid + "@os-1":         {Scheme: "barbican", ID: uuid, Service: "os-1"},
		"barbican:" + uuid + "@os?as=raw":    {Scheme: "barbican", ID: uuid, Service: "os", As: "raw"},
		"kms:local":                          {Scheme: "kms", Service: "local"},
		"kms:local/" + uuid:                  {Scheme: "kms", Service: "local", ID: uuid},
		"kms:local/measurementSecret?as=hex": {Scheme: "kms", Service: "local", ID: "measurementSecret", As: "hex"},
		"file:/etc/voldek/key":               {Scheme: "file", Path: "/etc/voldek/key"},
		"file:key.bin?as=base64":             {Scheme: "file", Path: "key.bin", As: "base64"},
		"file:/a?b@c:d#e%20":                 {Scheme: "file", Path: "/a?b@c:d#e%20"},
		"file:/a?as=hex?as=raw":              {Scheme: "file", Path: "/a?as=hex", As: "raw"},
		"credential:db.key":                  {Scheme: "credential", ID: "db.key"},
		"-":                                  {Scheme: "-"},
		"-?as=hex":                           {Scheme: "-", As: "hex"},
		"ask":                                {Scheme: "ask"},
		"token":                              {Scheme: "token"},
	} {
		got, err := keyclient.ParseRef(s)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v", s, got, err)
		}
		if got.String() != s {
			t.Errorf("%s: printed as %s", s, got)
		}
	}
	upper, err := keyclient.ParseRef("barbican:" + strings.ToUpper(uuid))
	if err != nil || upper.ID != uuid {
		t.Errorf("upper case: %+v, %v", upper, err)
	}
}

func TestBadRefs(t *testing.T) {
	for s, want := range map[string]string{
		"":                                   "names no key service",
		uuid:                                 "did you mean barbican:" + uuid,
		strings.ToUpper(uuid):                "did you mean barbican:" + uuid,
		"/etc/key":                           "did you mean file:PATH",
		"canary":                             "names no key service",
		"canary:canary":                      "names no known key service",
		"vault:secret/canary#key":            "vault: is no kind of key reference here",
		"barbican:":                          "wants the secret's UUID",
		"barbican:canary":                    "wants the secret's UUID",
		"barbican:https://canary/v1/secrets": "wants the secret's UUID",
		"barbican:" + uuid + "@":             "the service after @",
		"barbican:" + uuid + "@a/canary":     "the service after @",
		"barbican:" + uuid + "@..":           "the service after @",
		"kms:":                               "the service after kms:",
		"kms://cluster-kms?key=canary":       "belongs into the configuration",
		"kms:a/":                             "the key id",
		"kms:a/b/canary":                     "the key id",
		"kms:a/" + strings.Repeat("k", 65):   "the key id",
		"file:":                              "wants a path",
		"file:/a\nb":                         "wants a path",
		"file:/a\x00":                        "wants a path",
		"file:" + strings.Repeat("p", 4097):  "wants a path",
		"credential:../canary":               "credential's name",
		"credential:..":                      "credential's name",
		"file:/a?as=canary":                  "after ?as=",
		"ask?as=HEX":                         "after ?as=",
		"-x":                                 "names no key service",
		strings.Repeat("x", 5000):            "at most",
	} {
		_, err := keyclient.ParseRef(s)
		if exit.Of(err) != exit.Usage || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", s, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "canary") {
			t.Errorf("%q: what may be a secret is in the error: %v", s, err)
		}
	}
}

func TestRefAsText(t *testing.T) {
	text, err := json.Marshal(map[string]keyclient.Ref{"key": {Scheme: "kms", Service: "local", As: "hex"}})
	if err != nil || string(text) != `{"key":"kms:local?as=hex"}` {
		t.Errorf("%s, %v", text, err)
	}
	var back struct{ Key keyclient.Ref }
	if err := json.Unmarshal(text, &back); err != nil || back.Key.String() != "kms:local?as=hex" {
		t.Errorf("%+v, %v", back, err)
	}
	if err := json.Unmarshal([]byte(`{"key":"nonsense"}`), &back); exit.Of(err) != exit.Usage {
		t.Errorf("nonsense: %v", err)
	}
}

func FuzzRef(f *testing.F) {
	for _, s := range []string{"barbican:" + uuid + "@os?as=raw", "kms:a/b", "file:/a?as=hex?as=raw", "credential:x", "-",
		"ask?as=base64", "token", "kms://cluster-kms?key=", uuid} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := keyclient.ParseRef(s)
		if err != nil {
			if exit.Of(err) != exit.Usage {
				t.Errorf("%q: code %d", s, exit.Of(err))
			}
			return
		}
		again, err := keyclient.ParseRef(r.String())
		if err != nil || again != r {
			t.Errorf("%q: %+v printed as %q and read as %+v, %v", s, r, r.String(), again, err)
		}
	})
}

func TestRefFromToken(t *testing.T) {
	for token, want := range map[string]string{
		`{"type":"voldek","keyslots":["0","31"],"ref":"barbican:` + uuid + `@os"}`:   "barbican:" + uuid + "@os",
		`{"type":"voldek","keyslots":[],"ref":"kms:local"}`:                          "kms:local",
		"\n{ \"ref\":\"kms:local/a?as=hex\",\"keyslots\":[],\"type\":\"voldek\" }\n": "kms:local/a?as=hex",
	} {
		got, err := keyclient.RefFromToken([]byte(token))
		if err != nil || got.String() != want {
			t.Errorf("%s: %s, %v", token, got, err)
		}
	}
	for name, token := range map[string]string{
		"not JSON":          `x`,
		"a list":            `[]`,
		"empty":             ``,
		"cut off":           `{"type":"voldek","keyslots":[],"ref":"kms:a"`,
		"two objects":       `{"type":"voldek","keyslots":[],"ref":"kms:a"}{}`,
		"other type":        `{"type":"clevis","keyslots":[],"ref":"kms:a"}`,
		"no type":           `{"keyslots":[],"ref":"kms:a"}`,
		"no keyslots":       `{"type":"voldek","ref":"kms:a"}`,
		"no ref":            `{"type":"voldek","keyslots":[]}`,
		"other case":        `{"type":"voldek","keyslots":[],"Ref":"kms:a"}`,
		"ref twice":         `{"type":"voldek","keyslots":[],"ref":"kms:a","ref":"kms:b"}`,
		"unknown field":     `{"type":"voldek","keyslots":[],"ref":"kms:a","endpoint":"https://evil"}`,
		"slot is no number": `{"type":"voldek","keyslots":["x"],"ref":"kms:a"}`,
		"slot 32":           `{"type":"voldek","keyslots":["32"],"ref":"kms:a"}`,
		"slot 00":           `{"type":"voldek","keyslots":["00"],"ref":"kms:a"}`,
		"slot as a number":  `{"type":"voldek","keyslots":[0],"ref":"kms:a"}`,
		"a file":            `{"type":"voldek","keyslots":[],"ref":"file:/etc/shadow"}`,
		"a credential":      `{"type":"voldek","keyslots":[],"ref":"credential:x"}`,
		"stdin":             `{"type":"voldek","keyslots":[],"ref":"-"}`,
		"itself":            `{"type":"voldek","keyslots":[],"ref":"token"}`,
		"an address":        `{"type":"voldek","keyslots":[],"ref":"kms://cluster-kms?key=a"}`,
		"ref is a number":   `{"type":"voldek","keyslots":[],"ref":1}`,
		"too long":          `{"type":"voldek","keyslots":[],"ref":"kms:a"}` + strings.Repeat(" ", 5000),
	} {
		if got, err := keyclient.RefFromToken([]byte(token)); exit.Of(err) != exit.BadHeader {
			t.Errorf("%s: %s, %v", name, got, err)
		}
	}
}

func FuzzToken(f *testing.F) {
	f.Add([]byte(`{"type":"voldek","keyslots":["0"],"ref":"barbican:` + uuid + `@os"}`))
	f.Fuzz(func(t *testing.T, token []byte) {
		r, err := keyclient.RefFromToken(token)
		if err == nil && r.Scheme != keyclient.SchemeBarbican && r.Scheme != keyclient.SchemeKMS {
			t.Errorf("%q: %s", token, r)
		}
	})
}
