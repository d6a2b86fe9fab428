package call

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"
	"unicode"

	"voldek/internal/exit"
)

const (
	// AttemptTimeout bounds one request, from dialling to the last byte of the answer.
	AttemptTimeout = 5 * time.Second
	// maxAnswer bounds the body of any answer, in bytes; a large Keystone catalogue has some 200 KiB.
	maxAnswer = 1 << 20
	maxHeader = 64 << 10
)

// Dial opens a connection; tests put a network in memory here.
type Dial func(ctx context.Context, network, address string) (net.Conn, error)

// Policy is what the network may do for one service.
type Policy struct {
	CAFile   string // PEM; empty: the system's roots
	Insecure bool   // allows http://; certificates are checked all the same
	Dial     Dial   // nil: net.Dialer
}

// policyError is a request that our own rules forbid. It is never retried.
type policyError struct{ text string }

func (e *policyError) Error() string       { return e.text }
func (e *policyError) ExitCode() exit.Code { return exit.Failed }

// Client returns an HTTP client under the policy: TLS 1.2 or later, no proxy from the environment, no redirect to
// another host, no http:// unless allowed, bodies bounded, AttemptTimeout for each request. The CA file is read now, so a
// client made after its rotation trusts the new one. The caller closes its idle connections.
func (p Policy) Client() (*http.Client, error) {
	roots, err := p.roots()
	if err != nil {
		return nil, err
	}
	dial := p.Dial
	if dial == nil {
		dial = (&net.Dialer{Timeout: AttemptTimeout}).DialContext
	}
	transport := &http.Transport{
		Proxy:                  nil,
		DialContext:            dial,
		TLSClientConfig:        &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout:    AttemptTimeout,
		MaxResponseHeaderBytes: maxHeader,
		DisableCompression:     true, // no bomb to unpack
		IdleConnTimeout:        30 * time.Second,
		MaxIdleConnsPerHost:    8,
	}
	return &http.Client{
		Transport:     &guard{transport, p.Insecure},
		CheckRedirect: sameHost,
		Timeout:       AttemptTimeout,
	}, nil
}

func (p Policy) roots() (*x509.CertPool, error) {
	if p.CAFile == "" {
		return nil, nil
	}
	pem, err := os.ReadFile(p.CAFile)
	if err != nil {
		return nil, fmt.Errorf("ca_file: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("ca_file: %s holds no certificate", p.CAFile)
	}
	return roots, nil
}

// sameHost lets a redirect through only where scheme, host and port stay: Go would send the token header anywhere.
func sameHost(next *http.Request, via []*http.Request) error {
	first := via[0].URL
	if next.URL.Scheme != first.Scheme || next.URL.Host != first.Host {
		return &policyError{"redirected to another host, which is not followed"}
	}
	if len(via) >= 3 {
		return &policyError{"redirected more than 3 times"}
	}
	return nil
}

// guard enforces what must hold for each single request, also after a redirect or for an address from a catalogue.
type guard struct {
	next     *http.Transport
	insecure bool
}

func (g *guard) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Scheme != "https" && !g.insecure {
		return nil, &policyError{"http:// is refused, the key would cross the network in the clear; use https://, or set insecure = true"}
	}
	answer, err := g.next.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	answer.Body = &bounded{answer.Body, maxAnswer}
	return answer, nil
}

// CloseIdleConnections is what http.Client.CloseIdleConnections looks for.
func (g *guard) CloseIdleConnections() { g.next.CloseIdleConnections() }

// ErrTooLong is an answer whose body passes the bound.
var ErrTooLong = fmt.Errorf("the answer is too long: %w", ErrContentType)

// bounded fails once more than left bytes were read, where io.LimitedReader would end the answer as if it were whole.
type bounded struct {
	io.ReadCloser
	left int
}

func (b *bounded) Read(p []byte) (int, error) {
	if len(p) > b.left+1 {
		p = p[:b.left+1]
	}
	n, err := b.ReadCloser.Read(p)
	if b.left -= n; b.left < 0 {
		return 0, ErrTooLong
	}
	return n, err
}

// isTLS reports a handshake that failed for a reason that a second attempt does not heal.
func isTLS(err error) bool {
	var (
		verify *tls.CertificateVerificationError
		record tls.RecordHeaderError
		alert  tls.AlertError
	)
	return errors.As(err, &verify) || errors.As(err, &record) || errors.As(err, &alert) || isRemoteAlert(err)
}

// isRemoteAlert reports an alert that the peer sent: crypto/tls wraps it in a net.OpError with this Op.
func isRemoteAlert(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && (op.Op == "remote error" || op.Op == "local error")
}

func tlsText(err error) string {
	var (
		verify *tls.CertificateVerificationError
		op     *net.OpError
	)
	switch {
	case errors.As(err, &verify):
		return printable(verify.Err.Error())
	case errors.As(err, &op):
		return printable(op.Err.Error())
	}
	return "the answer is not TLS"
}

// printable keeps names out of a peer's certificate from writing into a terminal or a log.
func printable(text string) string {
	text = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, text)
	if len(text) > 200 {
		return text[:200] + "…"
	}
	return text
}
