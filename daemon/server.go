package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"mime/multipart"
	"net"
	"net/http"
	"time"

	"voldek/daemon/api"
	"voldek/internal/exit"
	"voldek/internal/secret"
)

// The control socket: HTTP with JSON, its words in package api. Every answer is one JSON object; every refusal carries an
// exit code. A caller whose credentials the socket's rule does not allow is turned away before its request is read.

// Server answers on the control socket.
type Server struct {
	engine  *Engine
	allowed PeerRule
	http    http.Server
}

// NewServer returns a server for engine that answers the peers which allowed accepts.
func NewServer(engine *Engine, allowed PeerRule, log *slog.Logger) *Server {
	s := &Server{engine: engine, allowed: allowed}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/volumes", s.list)
	mux.HandleFunc("GET /v1/volumes/{name}", s.status)
	mux.HandleFunc("PUT /v1/volumes/{name}", s.attach)
	mux.HandleFunc("DELETE /v1/volumes/{name}", s.detach)
	mux.HandleFunc("GET /v1/events", s.events)
	s.http = http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 10 * time.Second,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		BaseContext:       func(net.Listener) context.Context { return engine.life },
	}
	return s
}

// Serve answers on listener, a unix socket, until Close.
func (s *Server) Serve(listener net.Listener) error {
	err := s.http.Serve(&peerListener{Listener: listener, allowed: s.allowed})
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// Close stops listening and ends the connections.
func (s *Server) Close() error { return s.http.Close() }

func (s *Server) list(w http.ResponseWriter, _ *http.Request) {
	answer(w, http.StatusOK, api.Volumes{Version: api.Version, Volumes: s.engine.List()})
}

func (s *Server) status(w http.ResponseWriter, r *http.Request) {
	volume, err := s.engine.Status(r.PathValue("name"))
	answerVolume(w, volume, err)
}

func (s *Server) attach(w http.ResponseWriter, r *http.Request) {
	request, key, err := readAttach(r)
	if err == nil && request.Name != r.PathValue("name") {
		key.Wipe()
		err = fmt.Errorf("%w: the name in the path and in the body differ", ErrRequest)
	}
	if err != nil {
		answerVolume(w, api.Volume{}, err)
		return
	}
	volume, err := s.engine.Attach(r.Context(), request, key)
	answerVolume(w, volume, err)
}

func (s *Server) detach(w http.ResponseWriter, r *http.Request) {
	volume, err := s.engine.Detach(r.Context(), r.PathValue("name"))
	answerVolume(w, volume, err)
}

// events streams state changes until the caller hangs up or the daemon ends.
func (s *Server) events(w http.ResponseWriter, r *http.Request) {
	events, stop := s.engine.Watch()
	defer stop()
	w.Header().Set("Content-Type", "application/x-ndjson")
	flusher := http.NewResponseController(w)
	_ = flusher.Flush()
	encoder := json.NewEncoder(w)
	for {
		select {
		case event := <-events:
			if encoder.Encode(event) != nil || flusher.Flush() != nil {
				return
			}
		case <-r.Context().Done():
			return
		}
	}
}

// readAttach reads the request and, in the multipart form, the key beside it, which the caller wipes.
func readAttach(r *http.Request) (api.AttachRequest, *secret.Buffer, error) {
	kind, params, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil {
		return api.AttachRequest{}, nil, fmt.Errorf("%w: Content-Type: %w", ErrRequest, err)
	}
	switch kind {
	case "application/json":
		request, err := decodeAttach(r.Body)
		return request, nil, err
	case "multipart/form-data":
		return readAttachParts(multipart.NewReader(r.Body, params["boundary"]))
	}
	return api.AttachRequest{}, nil, fmt.Errorf("%w: Content-Type %q", ErrRequest, kind)
}

func readAttachParts(parts *multipart.Reader) (request api.AttachRequest, key *secret.Buffer, err error) {
	part, err := nextPart(parts, "request")
	if err != nil {
		return request, nil, err
	}
	if request, err = decodeAttach(part); err != nil {
		return request, nil, err
	}
	if part, err = nextPart(parts, "key"); err != nil {
		return request, nil, err
	}
	if key, err = secret.ReadAll(part, api.MaxKey); err != nil {
		return request, nil, fmt.Errorf("%w: key: %w", ErrRequest, err)
	}
	return request, key, nil
}

func nextPart(parts *multipart.Reader, name string) (*multipart.Part, error) {
	part, err := parts.NextRawPart()
	if err != nil {
		return nil, fmt.Errorf("%w: part %q: %w", ErrRequest, name, err)
	}
	if part.FormName() != name {
		return nil, fmt.Errorf("%w: part %q is %q", ErrRequest, name, part.FormName())
	}
	return part, nil
}

// decodeAttach reads exactly one JSON object with no unknown field.
func decodeAttach(r io.Reader) (request api.AttachRequest, err error) {
	decoder := json.NewDecoder(io.LimitReader(r, api.MaxRequest))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&request); err != nil {
		return request, fmt.Errorf("%w: %w", ErrRequest, err)
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return request, fmt.Errorf("%w: more than one JSON value, or too long", ErrRequest)
	}
	return request, nil
}

func answerVolume(w http.ResponseWriter, volume api.Volume, err error) {
	if err != nil {
		answer(w, httpStatus(exit.Of(err)), api.Answer{Version: api.Version, Error: api.NewError(err, "")})
		return
	}
	answer(w, http.StatusOK, api.Answer{Version: api.Version, Volume: &volume})
}

func answer(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body)
}

// httpStatus is for people with curl; programs read the exit code.
func httpStatus(code exit.Code) int {
	switch code {
	case exit.Usage:
		return http.StatusBadRequest
	case exit.NoDevice, exit.NoKey:
		return http.StatusNotFound
	case exit.Busy:
		return http.StatusConflict
	case exit.Denied, exit.NotAllowed, exit.WrongKey:
		return http.StatusForbidden
	case exit.Unreached, exit.NoDaemon:
		return http.StatusServiceUnavailable
	case exit.BadHeader:
		return http.StatusUnprocessableEntity
	}
	return http.StatusInternalServerError
}
