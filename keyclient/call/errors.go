// Package call is how every network room of keyclient makes one call to a key service: the errors it answers with, the
// TLS and redirect policy, the retries. It does not know any service's protocol.
package call

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"syscall"
	"time"

	"voldek/internal/exit"
)

// What a key service can answer other than a key. The rooms wrap them in a text that begins with the service's address.
var (
	ErrNoKey       = exit.New(exit.NoKey, "no such key")
	ErrDenied      = exit.New(exit.Denied, "denied")
	ErrUnreached   = exit.New(exit.Unreached, "not reached")
	ErrContentType = exit.New(exit.Failed, "unexpected content")
)

// status is an HTTP answer other than the one asked for.
type status struct {
	code       int
	requestID  string
	retryAfter time.Duration
}

func (s *status) Error() string {
	text := fmt.Sprintf("HTTP %d %s", s.code, http.StatusText(s.code))
	if s.code == http.StatusTooManyRequests || s.code == http.StatusServiceUnavailable {
		text = fmt.Sprintf("HTTP %d, overloaded or down", s.code)
	}
	return text + InBrackets(s.requestID)
}

// Status returns the error for an HTTP answer with an unwanted status. Nothing of its body is kept: a service in debug
// mode repeats the request there, password included. requestID is what Request returned for the header.
func Status(code int, header http.Header, requestID string) error {
	return &status{code, requestID, retryAfter(header.Get("Retry-After"))}
}

// StatusOf returns the HTTP status and the request id in err's chain, or 0.
func StatusOf(err error) (code int, requestID string) {
	var s *status
	if errors.As(err, &s) {
		return s.code, s.requestID
	}
	return 0, ""
}

var plainID = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,64}$`)

// RequestID returns the value of the header name, or "" where it is not a plain id that can go into an error or a log.
func RequestID(header http.Header, name string) string {
	if id := header.Get(name); plainID.MatchString(id) {
		return id
	}
	return ""
}

// InBrackets returns " (request ID)", or "" without one.
func InBrackets(requestID string) string {
	if requestID == "" {
		return ""
	}
	return " (request " + requestID + ")"
}

// Cause says in a few words why no answer came. It passes on only texts that are known to hold nothing of what the peer
// sent: net/http quotes a malformed answer, which may be a key.
func Cause(err error) string {
	var (
		s     *status
		errno syscall.Errno
		dns   *net.DNSError
		p     *policyError
		wire  *url.Error
		timed net.Error
	)
	switch {
	case errors.As(err, &s):
		return s.Error()
	case errors.As(err, &p):
		return p.Error()
	case isTLS(err):
		return "TLS: " + tlsText(err)
	case errors.As(err, &errno):
		return errno.Error()
	case errors.As(err, &dns):
		return "host name not resolved"
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &timed) && timed.Timeout():
		return "no answer in time"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "connection closed before the answer was complete"
	case errors.As(err, &wire):
		return "the answer is not HTTP"
	}
	return "the answer could not be read"
}

// PlainID reports whether s is an id that can go into an error, a log or a command to paste.
func PlainID(s string) bool { return plainID.MatchString(s) }
