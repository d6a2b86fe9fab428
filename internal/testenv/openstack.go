package testenv

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// OpenStackEnv is a running Keystone and Barbican on loopback, over TLS with a CA of their own.
type OpenStackEnv struct {
	AuthURL, Barbican, Region, CAFile string

	ProjectID                string // of Creator, Observer and the application credential
	OtherProject             string // id of OtherUser's project
	Creator                  string // may create and read
	CreatorID                string
	Observer                 string // may only read
	OtherUser                string // creator, but in OtherProject
	Password                 string // of all three
	AppCredID, AppCredSecret string

	client *http.Client
	token  string // of Creator
}

var openstack struct {
	sync.Mutex
	env *OpenStackEnv
}

// OpenStack returns the real Keystone and Barbican, started at the first call on this machine and shared by all test
// processes; the last one to end takes them down. The first start ever takes some 20 seconds (minutes where the packages
// are missing), a later one 5. Tests must not stop the servers or change the users.
func OpenStack(t testing.TB) *OpenStackEnv {
	t.Helper()
	Long(t)
	openstack.Lock()
	defer openstack.Unlock()
	if openstack.env == nil {
		Tool(t, "flock")
		openstack.env = startOpenStack(t)
	}
	return openstack.env
}

// startOpenStack holds a shared lock on the data while this process lives. A small shell holds the same lock and waits
// for the end of this process, however it ends; who can then make the lock exclusive was the last.
func startOpenStack(t testing.TB) *OpenStackEnv {
	scripts := filepath.Join(RepoRoot(), "internal", "testenv", "openstack")
	up, err := os.ReadFile(filepath.Join(scripts, "up.sh"))
	if err != nil {
		t.Fatal(err)
	}
	base := CacheDir(t, "openstack", RepoRoot(), string(up))
	data := filepath.Join(base, "data")

	starting := lock(t, filepath.Join(base, "starting"), unix.LOCK_EX)
	defer starting.Close()
	inUse := lock(t, filepath.Join(base, "in-use"), unix.LOCK_SH)
	defer inUse.Close() // the shell has it too
	ports := filepath.Join(base, "ports")
	cmd := exec.Command(filepath.Join(scripts, "up.sh"))
	cmd.Env = append(os.Environ(), append(readPorts(t, ports), "DATA="+data, "TLS=1")...)
	if out, err := cmd.CombinedOutput(); err != nil {
		// Another program may have taken the ports since: the next run begins anew with others.
		_ = os.RemoveAll(data)
		_ = os.Remove(ports)
		t.Fatalf("start OpenStack: %v\n%s", err, out)
	}

	guard := exec.Command("sh", "-c", `cat >/dev/null; flock -n -x 3 && exec "$0"`, filepath.Join(scripts, "down.sh"))
	guard.Env = append(os.Environ(), "DATA="+data)
	guard.ExtraFiles = []*os.File{inUse}
	guard.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	end, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	guard.Stdin = end
	if err := guard.Start(); err != nil {
		t.Fatal(err)
	}
	_ = end.Close()
	untilExit = append(untilExit, writer)
	return newOpenStackEnv(t, filepath.Join(data, "env"))
}

// untilExit keeps pipes from being closed by the garbage collector.
var untilExit []*os.File

func lock(t testing.TB, path string, how int) *os.File {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(f.Fd()), how); err != nil {
		t.Fatal(err)
	}
	return f
}

// readPorts chooses two free ports once; they are kept with the data, whose catalogue holds them.
func readPorts(t testing.TB, path string) []string {
	if kept, err := os.ReadFile(path); err == nil {
		return strings.Fields(string(kept))
	}
	var chosen []string
	for _, name := range []string{"KEYSTONE_PORT", "BARBICAN_PORT"} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		chosen = append(chosen, fmt.Sprintf("%s=%d", name, l.Addr().(*net.TCPAddr).Port))
	}
	if err := os.WriteFile(path, []byte(strings.Join(chosen, "\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	return chosen
}

func newOpenStackEnv(t testing.TB, path string) *OpenStackEnv {
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	v := map[string]string{}
	for _, word := range strings.Fields(string(text)) {
		if name, value, ok := strings.Cut(word, "="); ok {
			v[name] = value
		}
	}
	e := &OpenStackEnv{
		AuthURL: v["OS_AUTH_URL"], Barbican: v["IT_BARBICAN"], Region: v["OS_REGION_NAME"], CAFile: v["OS_CACERT"],
		ProjectID: v["IT_PROJECT_ID"], OtherProject: v["IT_OTHER_PROJECT_ID"], Creator: v["IT_USER"],
		CreatorID: v["IT_USER_ID"], Observer: v["IT_OBSERVER"], OtherUser: v["IT_OTHER_USER"], Password: v["IT_PASSWORD"],
		AppCredID: v["IT_APPCRED_ID"], AppCredSecret: v["IT_APPCRED_SECRET"],
	}
	ca, err := os.ReadFile(e.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	e.client = &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots}, DisableKeepAlives: true}}
	e.token = e.Token(t, e.Creator, e.ProjectID)
	return e
}

// Token logs one of the users in and returns the token.
func (e *OpenStackEnv) Token(t testing.TB, user, projectID string) string {
	t.Helper()
	type m = map[string]any
	answer := e.call(t, http.MethodPost, e.AuthURL+"/auth/tokens", nil, m{"auth": m{
		"identity": m{"methods": []string{"password"}, "password": m{"user": m{
			"name": user, "password": e.Password, "domain": m{"id": "default"}}}},
		"scope": m{"project": m{"id": projectID}}}}, nil)
	return answer.Get("X-Subject-Token")
}

// Revoke makes a token worthless at once.
func (e *OpenStackEnv) Revoke(t testing.TB, token string) {
	t.Helper()
	e.call(t, http.MethodDelete, e.AuthURL+"/auth/tokens", http.Header{"X-Auth-Token": {token}, "X-Subject-Token": {token}}, nil, nil)
}

// UserID returns the id of one of the users, in whose project projectID is.
func (e *OpenStackEnv) UserID(t testing.TB, user, projectID string) string {
	t.Helper()
	token := e.Token(t, user, projectID)
	var answer struct {
		Token struct{ User struct{ ID string } }
	}
	e.call(t, http.MethodGet, e.AuthURL+"/auth/tokens",
		http.Header{"X-Auth-Token": {token}, "X-Subject-Token": {token}}, nil, &answer)
	return answer.Token.User.ID
}

// OrderKey lets Barbican make a key of so many bits, as Cinder does, and returns its secret's UUID and the key itself.
func (e *OpenStackEnv) OrderKey(t testing.TB, bits int) (uuid string, raw []byte) {
	t.Helper()
	var order struct {
		OrderRef  string `json:"order_ref"`
		SecretRef string `json:"secret_ref"`
	}
	e.call(t, http.MethodPost, e.Barbican+"/v1/orders", nil, map[string]any{"type": "key", "meta": map[string]any{
		"name": "volume key", "algorithm": "aes", "mode": "xts", "bit_length": bits,
		"payload_content_type": "application/octet-stream"}}, &order)
	e.call(t, http.MethodGet, order.OrderRef, nil, nil, &order)
	e.call(t, http.MethodGet, order.SecretRef+"/payload", http.Header{"Accept": {"application/octet-stream"}}, nil, &raw)
	return order.SecretRef[strings.LastIndex(order.SecretRef, "/")+1:], raw
}

// StoredSecret is what Store puts into Barbican.
type StoredSecret struct {
	Type    string // "symmetric", "opaque", "passphrase", …
	Payload []byte // nil: none
	Expires time.Time
}

// Store puts a secret into Barbican as Creator and returns its UUID.
func (e *OpenStackEnv) Store(t testing.TB, s StoredSecret) (uuid string) {
	t.Helper()
	body := map[string]any{"name": "stored by a test", "secret_type": s.Type}
	switch {
	case s.Payload == nil:
	case s.Type == "passphrase":
		body["payload"], body["payload_content_type"] = string(s.Payload), "text/plain"
	default:
		body["payload"] = base64.StdEncoding.EncodeToString(s.Payload)
		body["payload_content_type"], body["payload_content_encoding"] = "application/octet-stream", "base64"
	}
	if !s.Expires.IsZero() {
		body["expiration"] = s.Expires.UTC().Format(time.RFC3339)
	}
	var answer struct {
		SecretRef string `json:"secret_ref"`
	}
	e.call(t, http.MethodPost, e.Barbican+"/v1/secrets", nil, body, &answer)
	return answer.SecretRef[strings.LastIndex(answer.SecretRef, "/")+1:]
}

// Delete deletes a secret.
func (e *OpenStackEnv) Delete(t testing.TB, uuid string) {
	t.Helper()
	e.call(t, http.MethodDelete, e.Barbican+"/v1/secrets/"+uuid, nil, nil, nil)
}

// AllowRead puts a user of any project into the ACL of a secret.
func (e *OpenStackEnv) AllowRead(t testing.TB, uuid, userID string) {
	t.Helper()
	e.call(t, http.MethodPut, e.Barbican+"/v1/secrets/"+uuid+"/acl", nil,
		map[string]any{"read": map[string]any{"users": []string{userID}, "project-access": true}}, nil)
}

// call makes one request, as Creator where the header names no other token, and decodes a 2xx answer into out: a
// *[]byte takes it as it is, anything else as JSON.
func (e *OpenStackEnv) call(t testing.TB, method, url string, header http.Header, body, out any) http.Header {
	t.Helper()
	var sent bytes.Buffer
	if body != nil {
		if err := json.NewEncoder(&sent).Encode(body); err != nil {
			t.Fatal(err)
		}
	}
	r, err := http.NewRequestWithContext(t.Context(), method, url, &sent)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Accept", "application/json")
	if e.token != "" {
		r.Header.Set("X-Auth-Token", e.token)
	}
	for name, values := range header {
		r.Header[name] = values
	}
	answer, err := e.client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil || answer.StatusCode >= 300 {
		t.Fatalf("%s %s: %s, %v\n%s", method, url, answer.Status, err, text)
	}
	if raw, ok := out.(*[]byte); ok {
		*raw = text
	} else if out != nil {
		if err := json.Unmarshal(text, out); err != nil {
			t.Fatalf("%s %s: %v", method, url, err)
		}
	}
	return answer.Header
}
