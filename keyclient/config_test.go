package keyclient_test

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"testing"

	"github.com/BurntSushi/toml"

	"voldek/internal/exit"
	"voldek/keyclient"
)

const (
	inlineKey  = "c2VjcmV0LXNlY3JldC0zMi1ieXRlcy1sb25nLTAwMDA="
	inlineSalt = "c2FsdC1zYWx0LXNhbHQtMzItYnl0ZXMtbG9uZy0wMDA="
	cluster    = "kms://cluster-kms?key=" + inlineKey + "&salt=" + inlineSalt
	password   = "type = \"barbican\"\nauth_url = \"https://k/v3\"\nusername = \"u\"\nproject = \"p\"\npassword = \"credential:pw\"\n"
)

func parse(t testing.TB, text string) (keyclient.Config, error) {
	var c keyclient.Config
	meta, err := toml.Decode(text, &c)
	if err != nil {
		return c, err
	}
	if left := meta.Undecoded(); len(left) != 0 {
		t.Errorf("unknown keys %v", left)
	}
	return c, c.Check()
}

func TestGoodConfigs(t *testing.T) {
	for name, text := range map[string]string{
		"none": "",
		"all of barbican": "[service.os]\ndefault = true\n" + password + "user_domain = \"d\"\nproject_domain = \"d\"\nregion = \"r\"\n" +
			"interface = \"internal\"\nendpoint = \"https://b:9311\"\nca_file = \"/ca.pem\"\n",
		"http allowed": "[service.os]\ninsecure = true\n" + strings.Replace(password, "https", "http", 1),
		"application credential": "[service.os]\ntype = \"barbican\"\nauth_url = \"https://k\"\napplication_credential_id = \"i\"\n" +
			"application_credential_secret = \"file:/run/secret\"\n",
		"token":           "[service.os]\ntype = \"barbican\"\nauth_url = \"https://k\"\ntoken = \"file:/run/token\"\nproject_id = \"x\"\n",
		"cluster":         "[service.local]\ntype = \"kms\"\nkms = \"" + cluster + "\"\nstorage = \"storage://no-store\"\n",
		"cluster by file": "[service.local]\ntype = \"kms\"\nkms = \"kms://cluster-kms?keyFile=/k&saltCredential=s\"\n",
		"two":             "[service.a]\n" + password + "[service.b]\ndefault = true\n" + password,
	} {
		if _, err := parse(t, text); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestBadConfigsNameTheField(t *testing.T) {
	kms := func(uri string) string { return "[service.x]\ntype = \"kms\"\nkms = \"" + uri + "\"\n" }
	with := func(line string) string { return "[service.x]\n" + password + line + "\n" }
	without := func(field string) string {
		var kept []string
		for _, line := range strings.Split(password, "\n") {
			if !strings.HasPrefix(line, field+" ") {
				kept = append(kept, line)
			}
		}
		return "[service.x]\n" + strings.Join(kept, "\n")
	}
	for name, c := range map[string]struct{ text, want string }{
		"no type":              {"[service.x]\n", "service.x: type: is missing"},
		"other type":           {"[service.x]\ntype = \"vault\"\n", "service.x: type: is"},
		"bad name":             {"[service.\"a b\"]\n" + password, "a service's name"},
		"two defaults":         {"[service.a]\ndefault=true\n" + password + "[service.b]\ndefault=true\n" + password, "more than one"},
		"no auth_url":          {without("auth_url"), "auth_url: is missing"},
		"no username":          {without("username"), "username: is missing"},
		"no password":          {without("password"), "give exactly one of password"},
		"no project":           {without("project"), "project: is missing"},
		"literal password":     {strings.Replace(with(""), "credential:pw", "canary", 1), "password: is not a reference to a secret"},
		"relative file":        {strings.Replace(with(""), "credential:pw", "file:canary", 1), "password: is not a reference to a secret"},
		"http":                 {strings.Replace(with(""), "https", "http", 1), "auth_url: http:// is refused"},
		"http endpoint":        {with("endpoint = \"http://b\""), "endpoint: http:// is refused"},
		"userinfo":             {with("endpoint = \"https://u:canary@b\""), "endpoint: is not a URL"},
		"no URL":               {with("endpoint = \"canary\\u007f\""), "endpoint: is not a URL"},
		"ftp":                  {with("endpoint = \"ftp://b\""), "endpoint: is not an https:// URL"},
		"interface":            {with("interface = \"private\""), "interface: is public"},
		"two logins":           {with("token = \"credential:t\""), "give exactly one of password"},
		"two projects":         {with("project_id = \"i\""), "project, project_id"},
		"id without secret":    {with("application_credential_id = \"i\""), "application_credential_secret: is missing"},
		"kms in barbican":      {with("kms = \"" + cluster + "\""), "kms, storage: belong"},
		"barbican in kms":      {kms(cluster) + "region = \"r\"\n", "only the fields default, kms and storage"},
		"other kms":            {kms("kms://aws?key=canary"), "this version knows kms://cluster-kms only"},
		"no URI":               {kms("canary"), "kms: not a URI"},
		"storage URI as kms":   {kms("storage://no-store"), "kms: not a URI"},
		"host":                 {kms("kms://canary@cluster-kms?key=a"), "kms: not a URI"},
		"path":                 {kms("kms://cluster-kms/canary"), "kms: not a URI"},
		"fragment":             {kms(cluster + "#canary"), "no #fragment"},
		"bad escape":           {kms("kms://cluster-kms?key=canary%zz"), "percent-encoded"},
		"semicolon":            {kms("kms://cluster-kms?key=canary;salt=canary"), "percent-encoded"},
		"unknown parameter":    {kms(cluster + "&canary=1"), "and no other"},
		"twice":                {kms(cluster + "&key=" + inlineKey), "key stands twice"},
		"two forms":            {kms(cluster + "&keyFile=/k"), "exactly one of key, keyFile"},
		"no salt":              {kms("kms://cluster-kms?key=" + inlineKey), "exactly one of salt"},
		"space":                {kms("kms://cluster-kms?key=can+ary&salt=" + inlineSalt), "key holds a space; a plus sign in a URI is written %2B"},
		"no base64url":         {kms("kms://cluster-kms?key=canary%2B&salt=" + inlineSalt), "key: not base64url"},
		"short key":            {kms("kms://cluster-kms?key=Y2FuYXJ5&salt=" + inlineSalt), "key: 6 bytes, at least 16"},
		"short salt":           {kms("kms://cluster-kms?key=" + inlineKey + "&salt=Y2FuYXJ5"), "salt: 6 bytes, at least 32"},
		"bad credential":       {kms("kms://cluster-kms?keyCredential=../canary&salt=" + inlineSalt), "key: is not a reference"},
		"other storage":        {kms(cluster) + "storage = \"storage://aws?accessKey=canary\"\n", "storage: cluster-kms derives"},
		"storage with a param": {kms(cluster) + "storage = \"storage://no-store?x=canary\"\n", "storage: cluster-kms derives"},
		"storage is no URI":    {kms(cluster) + "storage = \"canary\"\n", "storage: not a URI"},
	} {
		_, err := parse(t, c.text)
		if exit.Of(err) != exit.Usage || !strings.Contains(fmt.Sprint(err), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
		if err != nil && (strings.Contains(err.Error(), "canary") || strings.Contains(err.Error(), inlineKey)) {
			t.Errorf("%s: a secret is in the error: %v", name, err)
		}
	}
}

func TestURIsArePrintedRedacted(t *testing.T) {
	for uri, want := range map[string]string{
		cluster: "kms://cluster-kms?key=[secret]&salt=[secret]",
		"kms://cluster-kms?keyFile=/k&salt=canary": "kms://cluster-kms?keyFile=/k&salt=[secret]",
		"storage://no-store":                       "storage://no-store",
		"kms://cluster-kms?canary":                 "kms://cluster-kms?[secret]",
		"kms://cluster-kms?canary=canary":          "kms://cluster-kms?[secret]",
		"kms://cluster-kms?key=a?canary":           "kms://cluster-kms?key=[secret]",
		"kms://canary@aws?x=y":                     "[secret]",
		"canary":                                   "[secret]",
		"":                                         "[secret]",
	} {
		u := keyclient.URI(uri)
		service := keyclient.Service{KMS: u}
		var logged strings.Builder
		slog.New(slog.NewTextHandler(&logged, nil)).Info("x", "uri", u, "service", service)
		asJSON, err := json.Marshal(service)
		if err != nil {
			t.Fatal(err)
		}
		for _, text := range []string{fmt.Sprint(u), fmt.Sprintf("%v %+v %#v %s %q", u, service, service, u, u),
			logged.String(), string(asJSON)} {
			if strings.Contains(text, "canary") || strings.Contains(text, inlineKey) {
				t.Errorf("%s: printed as %s", uri, text)
			}
		}
		if got := keyclient.Redact(uri); got != want {
			t.Errorf("%s: %s, want %s", uri, got, want)
		}
	}
}

func TestHoldsSecrets(t *testing.T) {
	for uri, want := range map[string]bool{cluster: true, "kms://cluster-kms?keyFile=/k&saltFile=/s": false, "": false} {
		c := keyclient.Config{Services: map[string]keyclient.Service{"x": {Type: "kms", KMS: keyclient.URI(uri)}}}
		if c.HoldsSecrets() != want {
			t.Errorf("%s: %v", uri, !want)
		}
	}
}

// FuzzKMSURI: any path is read as it was written, and no secret is printed, whatever the URI.
func FuzzKMSURI(f *testing.F) {
	f.Add("/etc/key", cluster)
	f.Add("/a+b/c%41=d&e?f#g h", "kms://cluster-kms?key=%zz")
	f.Fuzz(func(t *testing.T, path, uri string) {
		built := "kms://cluster-kms?" + url.Values{"keyFile": {"/" + path}, "salt": {inlineSalt}}.Encode()
		got, err := keyclient.KMSKeySource(keyclient.URI(built))
		if err != nil || got != "file:/"+path {
			t.Errorf("%q: read as %q, %v", path, got, err)
		}
		c := keyclient.Config{Services: map[string]keyclient.Service{"x": {Type: "kms", KMS: keyclient.URI(uri)}}}
		if err := c.Check(); err != nil && exit.Of(err) != exit.Usage {
			t.Errorf("%q: code %d", uri, exit.Of(err))
		}
		planted := "kms://cluster-kms?key=canary" + strings.ReplaceAll(uri, "&", "") + "&salt=canary"
		if strings.Contains(strings.ReplaceAll(keyclient.Redact(planted), uri, ""), "canary") {
			t.Errorf("%q: printed as %s", planted, keyclient.Redact(planted))
		}
	})
}
