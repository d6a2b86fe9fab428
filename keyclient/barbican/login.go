package barbican

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/tokens"

	"voldek/internal/exit"
	"voldek/keyclient/call"
	"voldek/keyclient/file"
)

// session is one login: a token and the place of the key manager.
type session struct {
	service  *gophercloud.ServiceClient
	address  string // of Barbican, for people
	keystone string // of Keystone, for people
	user     string // our user's id, for the remedy of a refusal
	close    func() // gives up idle connections
}

// flight is a login under way, which all who need one wait for.
type flight struct {
	done    chan struct{}
	session *session
	err     error
}

// login returns the session in use, or a new one where there is none or it is the stale one. Of many callers one logs in.
// When that fails by refusal, all fail: a thousand attaches with a wrong password must not lock the account. When it
// fails because the caller that flew it ran out of time, the next one flies.
func (c *Client) login(ctx context.Context, stale *session) (*session, error) {
	for {
		c.mu.Lock()
		if c.session != nil && c.session != stale {
			defer c.mu.Unlock()
			return c.session, nil
		}
		f := c.flight
		if f == nil {
			f = &flight{done: make(chan struct{})}
			c.flight = f
			c.mu.Unlock()
			c.fly(ctx, f)
			return f.session, f.err
		}
		c.mu.Unlock()
		select {
		case <-f.done:
			if f.err == nil || !(errors.Is(f.err, call.ErrUnreached) || errors.Is(f.err, context.Canceled)) {
				return f.session, f.err
			}
		case <-ctx.Done():
		}
		if ctx.Err() != nil {
			return nil, call.Ended(ctx, address(c.config.AuthURL), "another attach is still logging in")
		}
	}
}

func (c *Client) fly(ctx context.Context, f *flight) {
	f.session, f.err = c.newSession(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.flight = nil
	if f.err == nil {
		if c.session != nil {
			c.session.close()
		}
		c.session = f.session
	}
	close(f.done)
}

// newSession reads the CA file and the credential anew, so that rotating them needs no restart.
func (c *Client) newSession(ctx context.Context) (*session, error) {
	keystone := address(c.config.AuthURL)
	client, err := c.policy.Client()
	if err != nil {
		return nil, fmt.Errorf("key service %s: %w", keystone, err)
	}
	s := &session{keystone: keystone, close: client.CloseIdleConnections}
	err = c.authenticate(ctx, client, s)
	if err != nil {
		client.CloseIdleConnections()
		return nil, err
	}
	return s, nil
}

func (c *Client) authenticate(ctx context.Context, client *http.Client, s *session) error {
	options, err := c.config.options()
	if err != nil {
		return fmt.Errorf("key service %s: %w", s.keystone, err)
	}
	provider, err := openstack.NewClient(c.config.AuthURL)
	if err != nil {
		return fmt.Errorf("key service %s: auth_url is not a URL", s.keystone)
	}
	provider.HTTPClient = *client
	token, err := call.Retry(ctx, s.keystone, func() (granted, error) {
		err := openstack.AuthenticateV3(ctx, provider, options, gophercloud.EndpointOpts{})
		if err != nil {
			return granted{}, plain(err)
		}
		return grant(provider.GetAuthResult())
	})
	code, requestID := call.StatusOf(err)
	switch {
	case errors.Is(err, call.ErrUnreached):
		return err
	case code == http.StatusUnauthorized, code == http.StatusForbidden, code == http.StatusNotFound:
		// 404 is Keystone's answer to an unknown application credential.
		return fmt.Errorf("key service %s: login %w%s; check %s", s.keystone, call.ErrDenied,
			call.InBrackets(requestID), c.config.loginFields())
	case err != nil:
		return fmt.Errorf("key service %s: login: %w", s.keystone, err)
	}
	endpoint := c.config.Endpoint
	if endpoint == "" {
		if endpoint, err = c.config.choose(token.catalog); err != nil {
			return fmt.Errorf("key service %s: %w", s.keystone, err)
		}
	}
	s.user, s.address = token.user, address(endpoint)
	s.service = &gophercloud.ServiceClient{ProviderClient: provider, Endpoint: versioned(endpoint), Type: "key-manager"}
	return nil
}

// options reads the credential. gophercloud takes strings and encodes them into JSON, so copies of it stay in ordinary
// memory until the garbage collector has used their room again; AllowReauth stays off, or it would keep them for ever.
func (c Config) options() (*gophercloud.AuthOptions, error) {
	o := &gophercloud.AuthOptions{IdentityEndpoint: c.AuthURL, Scope: c.scope()}
	switch {
	case c.Password != "":
		o.Username = c.Username
		o.DomainID, o.DomainName = domain(c.UserDomain)
		return o, into(&o.Password, "password", c.Password)
	case c.ApplicationCredentialSecret != "":
		o.ApplicationCredentialID = c.ApplicationCredentialID
		return o, into(&o.ApplicationCredentialSecret, "application_credential_secret", c.ApplicationCredentialSecret)
	}
	return o, into(&o.TokenID, "token", c.Token)
}

func into(to *string, field string, source file.Source) error {
	b, err := source.Read()
	if err != nil {
		return fmt.Errorf("%s: %w", field, err)
	}
	defer b.Wipe()
	*to = string(b.Bytes())
	return nil
}

func (c Config) scope() *gophercloud.AuthScope {
	switch {
	case c.ProjectID != "":
		return &gophercloud.AuthScope{ProjectID: c.ProjectID}
	case c.Project != "":
		scope := &gophercloud.AuthScope{ProjectName: c.Project}
		scope.DomainID, scope.DomainName = domain(c.ProjectDomain)
		return scope
	}
	return nil
}

// domain returns the id or the name of a domain. Keystone's own first domain has the id "default" and the name
// "Default"; whether names are compared by case depends on Keystone's database, so it goes by its id.
func domain(name string) (id, byName string) {
	if name == "" || strings.EqualFold(name, "default") {
		return "default", ""
	}
	return "", name
}

func (c Config) loginFields() string {
	switch {
	case c.Password != "":
		return "username, user_domain, project and password"
	case c.ApplicationCredentialSecret != "":
		return "application_credential_id, application_credential_secret and the credential's expiry"
	}
	return "token, which may have expired"
}

// granted is what is kept of Keystone's answer.
type granted struct {
	user    string
	catalog []tokens.CatalogEntry
}

func grant(result gophercloud.AuthResult) (g granted, err error) {
	parts, ok := result.(interface {
		ExtractUser() (*tokens.User, error)
		ExtractServiceCatalog() (*tokens.ServiceCatalog, error)
	})
	if !ok {
		return g, errNotJSON
	}
	token, err := result.ExtractTokenID()
	user, userErr := parts.ExtractUser()
	catalog, catalogErr := parts.ExtractServiceCatalog()
	if err != nil || userErr != nil || catalogErr != nil || token == "" || user == nil {
		return g, errNotJSON
	}
	if g.user = "USER-ID"; call.PlainID(user.ID) {
		g.user = user.ID
	}
	g.catalog = catalog.Entries
	return g, nil
}

var errNoEndpoint = exit.New(exit.Failed, "its catalogue has no fitting key-manager endpoint")

// choose finds Barbican in the catalogue. gophercloud's own search asks the endpoint for its versions, outside of any
// context; Barbican has but one.
func (c Config) choose(catalog []tokens.CatalogEntry) (string, error) {
	wanted := c.Interface
	if wanted == "" {
		wanted = "public"
	}
	for _, entry := range catalog {
		if entry.Type != "key-manager" {
			continue
		}
		for _, e := range entry.Endpoints {
			if e.Interface == wanted && (c.Region == "" || c.Region == e.RegionID || c.Region == e.Region) {
				if u, err := url.Parse(e.URL); err == nil && u.Host != "" && u.User == nil {
					return e.URL, nil
				}
			}
		}
	}
	in := ""
	if c.Region != "" {
		in = " in region " + c.Region
	}
	return "", fmt.Errorf("%w: interface %s%s; set interface, region or endpoint", errNoEndpoint, wanted, in)
}

// address is the part of a URL that people need.
func address(raw string) string {
	u, err := url.Parse(raw)
	if err != nil {
		return "[no URL]"
	}
	return u.Scheme + "://" + u.Host
}
