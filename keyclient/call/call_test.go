package call_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"voldek/internal/exit"
	"voldek/keyclient/call"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// authority issues certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) authority {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return authority{cert, key}
}

func (a authority) issue(t *testing.T, name string, ip net.IP, from, until time.Time) tls.Certificate {
	template := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name},
		NotBefore: from, NotAfter: until, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	if name != "" {
		template.DNSNames = []string{name}
	}
	if ip != nil {
		template.IPAddresses = []net.IP{ip}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func (a authority) file(t *testing.T) string {
	path := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestTLS(t *testing.T) {
	ours, theirs := newAuthority(t), newAuthority(t)
	loopback := net.IPv4(127, 0, 0, 1)
	now, hour := time.Now(), time.Hour
	good := ours.issue(t, "", loopback, now.Add(-hour), now.Add(hour))
	for name, c := range map[string]struct {
		cert tls.Certificate
		max  uint16
		want string // in the error; "" for success
	}{
		"good":              {good, tls.VersionTLS13, ""},
		"TLS 1.2":           {good, tls.VersionTLS12, ""},
		"TLS 1.1":           {good, tls.VersionTLS11, "TLS: "},
		"another authority": {theirs.issue(t, "", loopback, now.Add(-hour), now.Add(hour)), 0, "unknown authority"},
		"wrong name":        {ours.issue(t, "evil.test", nil, now.Add(-hour), now.Add(hour)), 0, "127.0.0.1"},
		"terminal in name":  {ours.issue(t, "evil\x1b]0;.test", nil, now.Add(-hour), now.Add(hour)), 0, "TLS: "},
		"expired":           {ours.issue(t, "", loopback, now.Add(-2*hour), now.Add(-hour)), 0, "expired"},
		"not yet valid":     {ours.issue(t, "", loopback, now.Add(hour), now.Add(2*hour)), 0, "not yet valid"},
	} {
		t.Run(name, func(t *testing.T) {
			s := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
			s.TLS = &tls.Config{Certificates: []tls.Certificate{c.cert}, MinVersion: tls.VersionTLS10, MaxVersion: c.max}
			s.Config.ErrorLog = log.New(io.Discard, "", 0)
			s.StartTLS()
			defer s.Close()
			err := get(t, call.Policy{CAFile: ours.file(t)}, s.URL)
			if c.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if exit.Of(err) != exit.Unreached || !strings.Contains(err.Error(), c.want) {
				t.Errorf("want %q: %v", c.want, err)
			}
			if err != nil && strings.ContainsRune(err.Error(), '\x1b') {
				t.Errorf("the certificate writes into the terminal: %q", err)
			}
		})
	}
}

// get makes one request with retries, as a room does.
func get(t *testing.T, p call.Policy, url string) error {
	t.Helper()
	client, err := p.Client()
	if err != nil {
		return err
	}
	defer client.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	start := time.Now()
	_, err = call.Retry(ctx, url, func() (int, error) {
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return 0, err
		}
		answer, err := client.Do(r)
		if err != nil {
			return 0, err
		}
		return answer.StatusCode, answer.Body.Close()
	})
	if time.Since(start) > 10*time.Second {
		t.Error("retried what a retry does not heal")
	}
	return err
}

func TestPlainHTTPAndProxies(t *testing.T) {
	s := httptest.NewServer(http.NotFoundHandler())
	defer s.Close()
	t.Setenv("HTTP_PROXY", "http://127.0.0.1:1")
	t.Setenv("HTTPS_PROXY", "http://127.0.0.1:1")
	if err := get(t, call.Policy{Insecure: true}, s.URL); err != nil {
		t.Errorf("allowed: %v", err)
	}
	if err := get(t, call.Policy{}, s.URL); exit.Of(err) != exit.Failed || !strings.Contains(err.Error(), "insecure = true") {
		t.Errorf("not allowed: %v", err)
	}
	for _, ca := range []string{"/nonexistent", "/dev/null"} {
		if err := get(t, call.Policy{CAFile: ca}, s.URL); err == nil || !strings.Contains(err.Error(), "ca_file: ") {
			t.Errorf("%s: %v", ca, err)
		}
	}
}

// What an attempt says that our own deadline cut short is less than what the one before it said.
func TestLastCauseIsNotOurOwnDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		tries := 0
		_, err := call.Retry(ctx, "https://h", func() (int, error) {
			if tries++; tries == 1 {
				return 0, call.Status(502, http.Header{}, "req-1")
			}
			<-ctx.Done()
			return 0, ctx.Err()
		})
		want := "key service https://h not reached in 1s: HTTP 502 Bad Gateway (request req-1)"
		if fmt.Sprint(err) != want || tries != 2 {
			t.Errorf("%d tries: %v, want %s", tries, err, want)
		}
	})
}

// The waits are spread over the whole of each interval, the intervals double, and none passes 30 seconds.
func TestWaitsHaveFullJitter(t *testing.T) {
	const runs, tries = 200, 12
	var least, most [tries]time.Duration
	for range runs {
		synctest.Test(t, func(t *testing.T) {
			n, last := 0, time.Now()
			_, _ = call.Retry(t.Context(), "", func() (int, error) {
				wait := time.Since(last)
				last = time.Now()
				if n > 0 {
					if least[n-1] == 0 || wait < least[n-1] {
						least[n-1] = wait
					}
					most[n-1] = max(most[n-1], wait)
				}
				if n++; n > tries {
					return 0, nil
				}
				return 0, call.Status(503, http.Header{}, "")
			})
		})
	}
	for i := range tries {
		interval := min(200*time.Millisecond<<i, 30*time.Second)
		if most[i] > interval || most[i] < interval*9/10 || least[i] > interval/10 {
			t.Errorf("wait %d was between %s and %s, want all of 0 to %s", i+1, least[i], most[i], interval)
		}
	}
}

func TestRequestIDs(t *testing.T) {
	for given, want := range map[string]string{
		"req-1f_2.X": "req-1f_2.X", "": "", "a b": "", "x\x1b[2J": "", strings.Repeat("a", 65): "",
	} {
		if got := call.RequestID(http.Header{"X-Id": {given}}, "X-Id"); got != want {
			t.Errorf("%q: %q, want %q", given, got, want)
		}
	}
}
