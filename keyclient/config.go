package keyclient

import (
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"

	"voldek/internal/exit"
	"voldek/keyclient/barbican"
	"voldek/keyclient/file"
)

// The types of a service.
const (
	TypeBarbican = "barbican"
	TypeKMS      = "kms"
)

// Config is the part of voldek.toml that names the key services.
type Config struct {
	Services map[string]Service `toml:"service"`
}

// Service is one [service.NAME]. The fields of the other type must be empty.
type Service struct {
	Type    string `toml:"type"`    // "barbican" or "kms"
	Default bool   `toml:"default"` // used by references that name no service

	// barbican: one of password, application credential and token logs in.
	AuthURL                     string      `toml:"auth_url"` // Keystone, with or without /v3
	Username                    string      `toml:"username"`
	UserDomain                  string      `toml:"user_domain"` // name; empty: Default
	Project                     string      `toml:"project"`     // name, or:
	ProjectID                   string      `toml:"project_id"`
	ProjectDomain               string      `toml:"project_domain"` // name; empty: Default
	Password                    file.Source `toml:"password"`
	ApplicationCredentialID     string      `toml:"application_credential_id"`
	ApplicationCredentialSecret file.Source `toml:"application_credential_secret"`
	Token                       file.Source `toml:"token"`
	Region                      string      `toml:"region"`    // empty: the first one in the catalogue
	Interface                   string      `toml:"interface"` // public (empty), internal or admin
	Endpoint                    string      `toml:"endpoint"`  // Barbican, in place of the catalogue
	CAFile                      string      `toml:"ca_file"`   // PEM; empty: the system's roots
	Insecure                    bool        `toml:"insecure"`  // allows http://

	// kms
	KMS     URI `toml:"kms"`     // kms://cluster-kms?…
	Storage URI `toml:"storage"` // storage://no-store, or empty
}

// Check reports the first field that is wrong, in the order of the services' names, as "service.NAME: FIELD: …" with
// exit.Usage. It uses no network and reads no secret.
func (c Config) Check() error {
	defaults := 0
	for _, name := range slices.Sorted(maps.Keys(c.Services)) {
		s := c.Services[name]
		if !isName(name) {
			return badName("a service's name")
		}
		if err := s.check(); err != nil {
			return fmt.Errorf("service.%s: %w", name, err)
		}
		if s.Default {
			defaults++
		}
	}
	if defaults > 1 {
		return badRef("more than one service has default = true")
	}
	return nil
}

// HoldsSecrets reports whether a KMS URI carries its secrets inline, so that the file with it must be closed to others.
func (c Config) HoldsSecrets() bool {
	for _, s := range c.Services {
		_, params, err := parseURI("kms", s.KMS)
		if err == nil && (params.Has("key") || params.Has("salt")) {
			return true
		}
	}
	return false
}

func (s Service) check() error {
	switch s.Type {
	case TypeBarbican:
		return s.checkBarbican()
	case TypeKMS:
		if s != (Service{Type: s.Type, Default: s.Default, KMS: s.KMS, Storage: s.Storage}) {
			return badRef("a service of type kms has only the fields default, kms and storage")
		}
		_, err := parseKMS(s.KMS, s.Storage)
		return err
	case "":
		return badRef("type: is missing; it is %q or %q", TypeBarbican, TypeKMS)
	}
	return badRef("type: is %q or %q", TypeBarbican, TypeKMS)
}

func (s Service) checkBarbican() error {
	if s.KMS != "" || s.Storage != "" {
		return badRef("kms, storage: belong to a service of type kms")
	}
	if err := errors.Join(s.checkURL("auth_url", s.AuthURL), s.checkURL("endpoint", s.Endpoint)); err != nil {
		return err
	}
	if s.AuthURL == "" {
		return badRef("auth_url: is missing")
	}
	if !slices.Contains([]string{"", "public", "internal", "admin"}, s.Interface) {
		return badRef("interface: is public, internal or admin")
	}
	return s.checkLogin()
}

func (s Service) checkLogin() error {
	logins := 0
	for _, source := range []struct {
		field string
		file.Source
	}{{"password", s.Password}, {"application_credential_secret", s.ApplicationCredentialSecret}, {"token", s.Token}} {
		if source.Source == "" {
			continue
		}
		logins++
		if err := source.Check(); err != nil {
			return fmt.Errorf("%s: %w", source.field, err)
		}
	}
	switch {
	case logins != 1:
		return badRef("give exactly one of password, application_credential_secret and token")
	case s.Password != "" && s.Username == "":
		return badRef("username: is missing")
	case s.Password == "" && (s.Username != "" || s.UserDomain != ""):
		return badRef("username, user_domain: go with a password only")
	case s.ApplicationCredentialSecret != "" && s.ApplicationCredentialID == "":
		return badRef("application_credential_id: is missing")
	case s.ApplicationCredentialSecret == "" && s.ApplicationCredentialID != "":
		return badRef("application_credential_secret: is missing")
	case s.Project != "" && s.ProjectID != "":
		return badRef("project, project_id: give one of them")
	case s.Password != "" && s.Project == "" && s.ProjectID == "":
		return badRef("project: is missing")
	case s.ApplicationCredentialID != "" && (s.Project != "" || s.ProjectID != ""):
		return badRef("project: an application credential has its own project")
	}
	return nil
}

func (s Service) checkURL(field, value string) error {
	if value == "" {
		return nil
	}
	u, err := url.Parse(value)
	if err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return badRef("%s: is not a URL of the form https://HOST[:PORT][/PATH]", field)
	}
	switch {
	case u.Scheme == "https", u.Scheme == "http" && s.Insecure:
		return nil
	case u.Scheme == "http":
		return badRef("%s: http:// is refused, the key would cross the network in the clear; use https://, or set insecure = true", field)
	}
	return badRef("%s: is not an https:// URL", field)
}

func (s Service) barbican() barbican.Config {
	return barbican.Config{
		AuthURL: s.AuthURL, Username: s.Username, UserDomain: s.UserDomain, Project: s.Project, ProjectID: s.ProjectID,
		ProjectDomain: s.ProjectDomain, Password: s.Password, ApplicationCredentialID: s.ApplicationCredentialID,
		ApplicationCredentialSecret: s.ApplicationCredentialSecret, Token: s.Token, Region: s.Region,
		Interface: s.Interface, Endpoint: s.Endpoint,
	}
}

var errNoService = exit.New(exit.Usage, "no such key service in the configuration")
