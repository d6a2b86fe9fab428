package barbican_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"voldek/internal/exit"
	"voldek/internal/testenv"
	"voldek/keyclient"
	"voldek/keyclient/file"
)

// stored writes a secret of the configuration into a private file.
func stored(t testing.TB, text string) file.Source {
	t.Helper()
	path := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(path, []byte(text+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return file.Source("file:" + path)
}

func byPassword(t testing.TB, e *testenv.OpenStackEnv) keyclient.Service {
	return keyclient.Service{Type: keyclient.TypeBarbican, AuthURL: e.AuthURL, Username: e.Creator, ProjectID: e.ProjectID,
		Password: stored(t, e.Password), CAFile: e.CAFile, Region: e.Region}
}

func open(t testing.TB, s keyclient.Service, options ...keyclient.Option) *keyclient.Clients {
	t.Helper()
	c, err := keyclient.New(keyclient.Config{Services: map[string]keyclient.Service{"os": s}}, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func fetch(t testing.TB, c keyclient.Client, ref string) (string, error) {
	t.Helper()
	r, err := keyclient.ParseRef(ref)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	key, err := c.Fetch(ctx, r, keyclient.Volume{})
	if err != nil {
		return "", err
	}
	defer key.Wipe()
	return string(key.Bytes()), nil
}

func TestLogins(t *testing.T) {
	e := testenv.OpenStack(t)
	id, raw := e.OrderKey(t, 256)
	withSlash := byPassword(t, e)
	withSlash.AuthURL = strings.TrimSuffix(e.AuthURL, "v3")
	byName := byPassword(t, e)
	byName.ProjectID, byName.Project, byName.UserDomain, byName.ProjectDomain = "", "it-project", "Default", "default"
	internal := byPassword(t, e)
	internal.Interface = "internal"
	direct := byPassword(t, e)
	direct.Endpoint, direct.Region = e.Barbican, ""
	for name, s := range map[string]keyclient.Service{
		"password": byPassword(t, e), "auth_url without v3": withSlash, "project by name": byName,
		"internal interface": internal, "endpoint": direct,
		"application credential": {Type: keyclient.TypeBarbican, AuthURL: e.AuthURL, CAFile: e.CAFile,
			ApplicationCredentialID: e.AppCredID, ApplicationCredentialSecret: stored(t, e.AppCredSecret)},
		"token": {Type: keyclient.TypeBarbican, AuthURL: e.AuthURL, CAFile: e.CAFile,
			Token: stored(t, e.Token(t, e.Creator, e.ProjectID))},
		"token for a project": {Type: keyclient.TypeBarbican, AuthURL: e.AuthURL, CAFile: e.CAFile, ProjectID: e.ProjectID,
			Token: stored(t, e.Token(t, e.Creator, e.ProjectID))},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := fetch(t, open(t, s), "barbican:"+id)
			if err != nil || got != hex.EncodeToString(raw) {
				t.Errorf("got %d bytes, %v", len(got), err)
			}
		})
	}
}

func TestRefusedLogins(t *testing.T) {
	e := testenv.OpenStack(t)
	wrongPassword := byPassword(t, e)
	wrongPassword.Password = stored(t, "canary-wrong")
	nowhere := byPassword(t, e)
	nowhere.Region = "nowhere"
	for name, c := range map[string]struct {
		s    keyclient.Service
		want error
		text string
	}{
		"wrong password": {wrongPassword, keyclient.ErrDenied, "login denied"},
		"wrong application credential secret": {keyclient.Service{Type: keyclient.TypeBarbican, AuthURL: e.AuthURL,
			CAFile: e.CAFile, ApplicationCredentialID: e.AppCredID, ApplicationCredentialSecret: stored(t, "canary-wrong")},
			keyclient.ErrDenied, "login denied"},
		"unknown application credential": {keyclient.Service{Type: keyclient.TypeBarbican, AuthURL: e.AuthURL,
			CAFile: e.CAFile, ApplicationCredentialID: "00000000000000000000000000000000",
			ApplicationCredentialSecret: stored(t, "canary-wrong")}, keyclient.ErrDenied, "login denied"},
		"wrong token": {keyclient.Service{Type: keyclient.TypeBarbican, AuthURL: e.AuthURL,
			CAFile: e.CAFile, Token: stored(t, "canary-wrong")}, keyclient.ErrDenied, "login denied"},
		"no such region": {nowhere, nil, "set interface, region or endpoint"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := fetch(t, open(t, c.s), "barbican:6c9a2f0e-1111-4222-8333-444455556666")
			if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v", err)
			}
			if err != nil && strings.Contains(err.Error(), "canary") {
				t.Errorf("the secret is in the error: %v", err)
			}
		})
	}
}

func TestFormsOfRealSecrets(t *testing.T) {
	e := testenv.OpenStack(t)
	c := open(t, byPassword(t, e))
	id256, raw256 := e.OrderKey(t, 256)
	id512, raw512 := e.OrderKey(t, 512)
	passphrase := e.Store(t, testenv.StoredSecret{Type: "passphrase", Payload: []byte("correct horse\nbattery")})
	opaque := e.Store(t, testenv.StoredSecret{Type: "opaque", Payload: []byte{0, 1, 0xfe, '\n'}})
	for ref, want := range map[string]string{
		"barbican:" + id256:                  hex.EncodeToString(raw256),
		"barbican:" + id512:                  hex.EncodeToString(raw512),
		"barbican:" + id512 + "@os?as=raw":   string(raw512),
		"barbican:" + strings.ToUpper(id256): hex.EncodeToString(raw256),
		"barbican:" + passphrase:             "correct horse\nbattery",
		"barbican:" + passphrase + "?as=hex": hex.EncodeToString([]byte("correct horse\nbattery")),
		"barbican:" + opaque:                 "0001fe0a",
		"barbican:" + opaque + "?as=base64":  "AAH+Cg==",
	} {
		if got, err := fetch(t, c, ref); err != nil || got != want {
			t.Errorf("%s: got %q, want %q, %v", ref, got, want, err)
		}
	}
	if len(raw256) != 32 || len(raw512) != 64 {
		t.Errorf("ordered keys of %d and %d bytes", len(raw256), len(raw512))
	}
}

func TestMissingSecrets(t *testing.T) {
	e := testenv.OpenStack(t)
	c := open(t, byPassword(t, e))
	deleted, _ := e.OrderKey(t, 256)
	e.Delete(t, deleted)
	expires := time.Now().Add(2 * time.Second)
	expired := e.Store(t, testenv.StoredSecret{Type: "symmetric", Payload: []byte("0123456789abcdef"), Expires: expires})
	for time.Now().Before(expires.Add(time.Second)) {
		time.Sleep(100 * time.Millisecond) // the clock that this waits for is Barbican's own
	}
	for name, id := range map[string]string{
		"unknown":         "6c9a2f0e-1111-4222-8333-444455556666",
		"deleted":         deleted,
		"expired":         expired,
		"without payload": e.Store(t, testenv.StoredSecret{Type: "symmetric"}),
	} {
		_, err := fetch(t, c, "barbican:"+id)
		if exit.Of(err) != exit.NoKey || !strings.Contains(err.Error(), e.Barbican) {
			t.Errorf("%s: %v", name, err)
		}
		if name != "without payload" && !strings.Contains(fmt.Sprint(err), "(request req-") {
			t.Errorf("%s: no request id: %v", name, err)
		}
	}
}

// The remedy in the error is carried out, as far as it can be without the command that it names.
func TestOtherProjectIsDeniedUntilTheACLAllows(t *testing.T) {
	e := testenv.OpenStack(t)
	id, raw := e.OrderKey(t, 256)
	s := byPassword(t, e)
	s.Username, s.ProjectID = e.OtherUser, e.OtherProject
	c := open(t, s)
	user := e.UserID(t, e.OtherUser, e.OtherProject)
	_, err := fetch(t, c, "barbican:"+id)
	remedy := "openstack acl user add --user " + user + " --operation-type read " + e.Barbican + "/v1/secrets/" + id
	if exit.Of(err) != exit.Denied || !strings.HasSuffix(fmt.Sprint(err), remedy) {
		t.Fatalf("got %v", err)
	}
	e.AllowRead(t, id, user)
	if got, err := fetch(t, c, "barbican:"+id); err != nil || got != hex.EncodeToString(raw) {
		t.Errorf("with the ACL: %v", err)
	}
}

// The real Keystone revokes the token; that one fetch logs in once again is counted with the fake.
func TestRevokedTokenIsDeniedUntilRotated(t *testing.T) {
	e := testenv.OpenStack(t)
	id, raw := e.OrderKey(t, 256)
	token := e.Token(t, e.Creator, e.ProjectID)
	source := stored(t, token)
	path := strings.TrimPrefix(string(source), "file:")
	c := open(t, keyclient.Service{Type: keyclient.TypeBarbican, AuthURL: e.AuthURL, CAFile: e.CAFile, Token: source})
	if _, err := fetch(t, c, "barbican:"+id); err != nil {
		t.Fatal(err)
	}
	e.Revoke(t, token)
	if _, err := fetch(t, c, "barbican:"+id); exit.Of(err) != exit.Denied {
		t.Errorf("with the revoked token: %v", err)
	}
	// The credential is read anew for each login, so a rotated one heals without a restart.
	if err := os.WriteFile(path, []byte(e.Token(t, e.Creator, e.ProjectID)), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := fetch(t, c, "barbican:"+id); err != nil || got != hex.EncodeToString(raw) {
		t.Errorf("with a rotated token: %v", err)
	}
}

func TestTLSNeedsTheRightCA(t *testing.T) {
	e := testenv.OpenStack(t)
	without := byPassword(t, e)
	without.CAFile = ""
	other := httptest.NewTLSServer(http.NotFoundHandler())
	defer other.Close()
	wrong := byPassword(t, e)
	wrong.CAFile = filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(wrong.CAFile, pemOf(other.Certificate().Raw), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, s := range map[string]keyclient.Service{"no CA": without, "another CA": wrong} {
		start := time.Now()
		_, err := fetch(t, open(t, s), "barbican:6c9a2f0e-1111-4222-8333-444455556666")
		if exit.Of(err) != exit.Unreached || !strings.Contains(err.Error(), "unknown authority") {
			t.Errorf("%s: %v", name, err)
		}
		if took := time.Since(start); took > 5*time.Second {
			t.Errorf("%s: retried for %s what a retry does not heal", name, took)
		}
	}
}

func TestServiceDown(t *testing.T) {
	e := testenv.OpenStack(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := "https://" + l.Addr().String()
	_ = l.Close()
	id, _ := e.OrderKey(t, 256)
	keystone := byPassword(t, e)
	keystone.AuthURL = closed + "/v3"
	barbican := byPassword(t, e)
	barbican.Endpoint = closed
	for name, s := range map[string]keyclient.Service{"keystone": keystone, "barbican": barbican} {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		start := time.Now()
		_, err := open(t, s).Fetch(ctx, keyclient.Ref{Scheme: keyclient.SchemeBarbican, ID: id}, keyclient.Volume{})
		took := time.Since(start)
		cancel()
		want := "key service " + closed + " not reached in 2s: connection refused"
		if exit.Of(err) != exit.Unreached || err.Error() != want || took > 3*time.Second {
			t.Errorf("%s: after %s: %v", name, took, err)
		}
	}
}

// A token revoked behind our back costs one login more, not an error.
func TestRevokedTokenIsRenewedByPassword(t *testing.T) {
	e := testenv.OpenStack(t)
	id, raw := e.OrderKey(t, 256)
	var token string
	front := httptest.NewServer(reverse(t, e, func(issued string) { token = issued }))
	defer front.Close()
	s := byPassword(t, e)
	s.AuthURL, s.Insecure = front.URL+"/v3", true
	c := open(t, s)
	for i := range 2 {
		if got, err := fetch(t, c, "barbican:"+id); err != nil || got != hex.EncodeToString(raw) {
			t.Fatalf("fetch %d: %v", i, err)
		}
		if i == 0 {
			e.Revoke(t, token)
		}
	}
}

// reverse passes requests on to the real Keystone and shows the tokens that it gives out.
func reverse(t *testing.T, e *testenv.OpenStackEnv, issued func(string)) http.Handler {
	target, err := url.Parse(strings.TrimSuffix(e.AuthURL, "/v3"))
	if err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(e.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	proxy := httputil.NewSingleHostReverseProxy(target)
	proxy.Transport = &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, DisableKeepAlives: true}
	proxy.ModifyResponse = func(r *http.Response) error {
		if token := r.Header.Get("X-Subject-Token"); token != "" {
			issued(token)
		}
		return nil
	}
	return proxy
}
