// Package barbican fetches secrets from OpenStack Barbican, logged in through Keystone v3. It does not know references
// or how a secret becomes a passphrase.
package barbican

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"strings"
	"sync"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack/keymanager/v1/secrets"

	"voldek/internal/exit"
	"voldek/internal/secret"
	"voldek/keyclient/call"
	"voldek/keyclient/file"
)

// TypePassphrase is the secret_type of a text to be used as it is.
const TypePassphrase = "passphrase"

// MaxPayload bounds a secret in bytes. Barbican's own default is 20,000.
const MaxPayload = 64 << 10

// ErrWrapped is a payload that the service should have unwrapped.
var ErrWrapped = exit.New(exit.Failed, "the key is still wrapped by STACKIT KMS, this Barbican lacks the plugin that unwraps it")

// Config says where and as whom to fetch. keyclient.Service documents the fields.
type Config struct {
	AuthURL                           string
	Username, UserDomain              string
	Project, ProjectID, ProjectDomain string
	Password                          file.Source
	ApplicationCredentialID           string
	ApplicationCredentialSecret       file.Source
	Token                             file.Source
	Region, Interface, Endpoint       string
}

// Secret is a fetched secret. The caller wipes Payload.
type Secret struct {
	Payload *secret.Buffer
	Type    string // symmetric, opaque, passphrase, …
}

// Client fetches from one Barbican with one login, renewed once when Barbican no longer takes it. It is safe for
// concurrent use.
type Client struct {
	config Config
	policy call.Policy

	mu      sync.Mutex
	session *session // the login in use, nil before the first
	flight  *flight  // the login under way, nil without one
}

// New uses no network.
func New(config Config, policy call.Policy) *Client { return &Client{config: config, policy: policy} }

// Close gives up idle connections.
func (c *Client) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.session != nil {
		c.session.close()
	}
}

// Fetch returns the secret with this id. Its errors wrap call.ErrNoKey, ErrDenied, ErrUnreached, ErrContentType or
// ErrWrapped.
func (c *Client) Fetch(ctx context.Context, id string) (Secret, error) {
	s, err := c.login(ctx, nil)
	if err != nil {
		return Secret{}, err
	}
	fetched, err := s.fetch(ctx, id)
	if code, _ := call.StatusOf(err); code == http.StatusUnauthorized {
		// The token expired or was revoked. One renewal, then it is a refusal.
		if s, err = c.login(ctx, s); err != nil {
			return Secret{}, err
		}
		fetched, err = s.fetch(ctx, id)
	}
	return fetched, s.explain(err, id)
}

// fetch asks for the metadata first: only they tell a passphrase from a key, and a missing payload from a missing secret.
func (s *session) fetch(ctx context.Context, id string) (Secret, error) {
	meta, err := call.Retry(ctx, s.address, func() (*secrets.Secret, error) { return s.metadata(ctx, id) })
	if err != nil {
		return Secret{}, err
	}
	switch meta.SecretType {
	case "symmetric", "opaque", TypePassphrase, "":
	default:
		return Secret{}, fmt.Errorf("%w: it is a certificate or half of a key pair", call.ErrContentType)
	}
	if len(meta.ContentTypes) == 0 {
		return Secret{}, fmt.Errorf("%w: the secret has no payload", call.ErrNoKey)
	}
	payload, err := call.Retry(ctx, s.address, func() (*secret.Buffer, error) { return s.payload(ctx, id) })
	if err != nil {
		return Secret{}, err
	}
	if err := checkPayload(payload.Bytes()); err != nil {
		payload.Wipe()
		return Secret{}, err
	}
	return Secret{payload, meta.SecretType}, nil
}

func (s *session) metadata(ctx context.Context, id string) (*secrets.Secret, error) {
	r := secrets.Get(ctx, s.service, id)
	if r.Err != nil {
		return nil, plain(r.Err)
	}
	if err := wantType(r.Header, "application/json"); err != nil {
		return nil, err
	}
	meta, err := r.Extract()
	if err != nil {
		return nil, errNotJSON
	}
	return meta, nil
}

func (s *session) payload(ctx context.Context, id string) (*secret.Buffer, error) {
	r := secrets.GetPayload(ctx, s.service, id, secrets.GetPayloadOpts{PayloadContentType: "application/octet-stream"})
	if r.Err != nil {
		return nil, plain(r.Err)
	}
	defer r.Body.Close()
	if err := wantType(r.Header, "application/octet-stream"); err != nil {
		return nil, err
	}
	payload, err := secret.ReadAll(r.Body, MaxPayload)
	if errors.Is(err, secret.ErrTooLong) {
		return nil, call.ErrTooLong
	}
	return payload, err
}

var errNotJSON = fmt.Errorf("%w: the answer is not the JSON it should be", call.ErrContentType)

// plain turns gophercloud's error, whose text holds the answer's body, into one that does not.
func plain(err error) error {
	var answer gophercloud.ErrUnexpectedResponseCode
	if errors.As(err, &answer) {
		return call.Status(answer.Actual, answer.ResponseHeader, requestID(answer.ResponseHeader))
	}
	if call.IsWire(err) {
		return err
	}
	return errNotJSON
}

func requestID(h http.Header) string { return call.RequestID(h, "X-Openstack-Request-Id") }

func wantType(h http.Header, want string) error {
	got, _, err := mime.ParseMediaType(h.Get("Content-Type"))
	if err != nil || got != want {
		return fmt.Errorf("%w: the answer is not %s%s", call.ErrContentType, want, call.InBrackets(requestID(h)))
	}
	return nil
}

// checkPayload refuses what can't be a key. STACKIT's Barbican stores JSON with a wrapped key and the place of its
// wrapping key; without its plugin the JSON itself comes back, and would pass as a passphrase.
func checkPayload(payload []byte) error {
	if len(payload) == 0 {
		return fmt.Errorf("%w: the payload is empty", call.ErrNoKey)
	}
	if bytes.HasPrefix(bytes.TrimSpace(payload), []byte("{")) && bytes.Contains(payload, []byte(`"stackit_`)) {
		return ErrWrapped
	}
	return nil
}

// explain puts the service's address, the secret and the remedy around what fetch returned.
func (s *session) explain(err error, id string) error {
	code, requestID := call.StatusOf(err)
	in := fmt.Sprintf("key service %s: secret %s", s.address, id)
	switch {
	case err == nil, errors.Is(err, call.ErrUnreached), errors.Is(err, context.Canceled):
		return err
	case code == http.StatusNotFound:
		return fmt.Errorf("%s: %w%s", in, call.ErrNoKey, call.InBrackets(requestID))
	case code == http.StatusForbidden:
		return fmt.Errorf("%s: %w%s; the user needs the role creator or member in the secret's project, or: "+
			"openstack acl user add --user %s --operation-type read %s", in, call.ErrDenied, call.InBrackets(requestID),
			s.user, s.service.ServiceURL("secrets", id))
	case code == http.StatusUnauthorized:
		return fmt.Errorf("%s: %w: the service does not take a fresh token of %s%s", in, call.ErrDenied, s.keystone,
			call.InBrackets(requestID))
	case code == http.StatusNotAcceptable:
		return fmt.Errorf("%s: %w: it can't be had as application/octet-stream%s", in, call.ErrContentType,
			call.InBrackets(requestID))
	}
	return fmt.Errorf("%s: %w", in, err)
}

// versioned returns a Barbican base URL as the URL of its v1 API, with a slash at the end.
func versioned(base string) string {
	base = strings.TrimRight(base, "/")
	if !strings.HasSuffix(base, "/v1") {
		base += "/v1"
	}
	return base + "/"
}
