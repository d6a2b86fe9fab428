// Package client is the CLI's side of the control socket. It turns a daemon's refusal back into an error with its exit
// code, and knows nothing of what the words mean.
package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime/multipart"
	"net"
	"net/http"
	"net/url"

	"voldek/daemon/api"
	"voldek/internal/exit"
	"voldek/internal/secret"
)

// ErrNoDaemon is returned when nobody answers on the socket, ErrNotAllowed when the socket may not be opened.
var (
	ErrNoDaemon   = exit.New(exit.NoDaemon, "voldekd does not answer")
	ErrNotAllowed = exit.New(exit.NotAllowed, "the control socket may not be used by this user")
)

// Client talks to one daemon. It is safe for concurrent use.
type Client struct {
	socket string
	http   http.Client
}

// New returns a client for the daemon at a unix socket.
func New(socket string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}
	return &Client{socket: socket, http: http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}}
}

// Attach opens a volume. key is the key that the references - and ask stand for, or nil; the caller wipes it.
func (c *Client) Attach(ctx context.Context, request api.AttachRequest, key *secret.Buffer) (*api.Volume, error) {
	body, contentType, err := attachBody(request, key)
	if err != nil {
		return nil, err
	}
	return c.volume(ctx, http.MethodPut, request.Name, body, contentType)
}

// attachBody is JSON alone, or with a key beside it, which is streamed from where it lies.
func attachBody(request api.AttachRequest, key *secret.Buffer) (io.Reader, string, error) {
	text, err := json.Marshal(request)
	if err != nil {
		return nil, "", err
	}
	if key == nil {
		return bytes.NewReader(text), "application/json", nil
	}
	var head bytes.Buffer
	form := multipart.NewWriter(&head)
	if err := form.WriteField("request", string(text)); err != nil {
		return nil, "", err
	}
	if _, err := form.CreateFormFile("key", "key"); err != nil {
		return nil, "", err
	}
	tail := "\r\n--" + form.Boundary() + "--\r\n"
	return io.MultiReader(&head, bytes.NewReader(key.Bytes()), bytes.NewReader([]byte(tail))), form.FormDataContentType(), nil
}

// Detach closes a volume and returns it detached.
func (c *Client) Detach(ctx context.Context, name string) (*api.Volume, error) {
	return c.volume(ctx, http.MethodDelete, name, nil, "")
}

// Status returns one volume.
func (c *Client) Status(ctx context.Context, name string) (*api.Volume, error) {
	return c.volume(ctx, http.MethodGet, name, nil, "")
}

func (c *Client) volume(ctx context.Context, method, name string, body io.Reader, contentType string) (*api.Volume, error) {
	var answer api.Answer
	if err := c.do(ctx, method, "/v1/volumes/"+url.PathEscape(name), body, contentType, &answer); err != nil {
		return nil, err
	}
	if answer.Error != nil {
		return nil, answer.Error
	}
	if answer.Volume == nil {
		return nil, fmt.Errorf("%s: %w: the answer holds no volume", c.socket, ErrNoDaemon)
	}
	return answer.Volume, nil
}

// List returns all volumes.
func (c *Client) List(ctx context.Context) ([]api.Volume, error) {
	var answer api.Volumes
	if err := c.do(ctx, http.MethodGet, "/v1/volumes", nil, "", &answer); err != nil {
		return nil, err
	}
	return answer.Volumes, nil
}

// Watch calls each with every change of a volume's state until ctx ends or the daemon does.
func (c *Client) Watch(ctx context.Context, each func(api.Event) error) error {
	response, err := c.send(ctx, http.MethodGet, "/v1/events", nil, "")
	if err != nil {
		return err
	}
	defer response.Body.Close()
	for decoder := json.NewDecoder(response.Body); ; {
		var event api.Event
		if err := decoder.Decode(&event); err != nil {
			return c.failure(ctx, err)
		}
		if err := each(event); err != nil {
			return err
		}
	}
}

func (c *Client) do(ctx context.Context, method, path string, body io.Reader, contentType string, answer any) error {
	response, err := c.send(ctx, method, path, body, contentType)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if err := json.NewDecoder(response.Body).Decode(answer); err != nil {
		return c.failure(ctx, err)
	}
	return nil
}

func (c *Client) send(ctx context.Context, method, path string, body io.Reader, contentType string) (*http.Response, error) {
	request, err := http.NewRequestWithContext(ctx, method, "http://voldekd"+path, body)
	if err != nil {
		return nil, err
	}
	if contentType != "" {
		request.Header.Set("Content-Type", contentType)
	}
	response, err := c.http.Do(request)
	if err != nil {
		return nil, c.failure(ctx, err)
	}
	return response, nil
}

// failure tells a caller's own interruption, a closed door and an absent daemon apart.
func (c *Client) failure(ctx context.Context, err error) error {
	var urlError *url.Error
	if errors.As(err, &urlError) {
		err = urlError.Err
	}
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%s: %w", c.socket, ErrNotAllowed)
	}
	return fmt.Errorf("%s: %w: %w", c.socket, ErrNoDaemon, err)
}
