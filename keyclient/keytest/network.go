package keytest

import (
	"bytes"
	"context"
	"io"
	"log"
	"net"
	"net/http"
	"slices"
	"sync"
	"syscall"
)

// Network is a network in memory: nothing leaves the process, and inside a synctest bubble its time is the bubble's.
// An address where nobody listens refuses the connection.
type Network struct {
	mu        sync.Mutex
	listeners map[string]*listener
	dialled   []string
}

// NewNetwork returns a network without hosts.
func NewNetwork() *Network { return &Network{listeners: map[string]*listener{}} }

// Dial opens a connection to a listener's address.
func (n *Network) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	n.mu.Lock()
	n.dialled = append(n.dialled, address)
	l := n.listeners[address]
	n.mu.Unlock()
	refused := &net.OpError{Op: "dial", Net: network, Err: syscall.ECONNREFUSED}
	if l == nil {
		return nil, refused
	}
	client, server := net.Pipe()
	select {
	case l.accept <- server:
		return client, nil
	case <-l.closed:
		return nil, refused
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Dialled reports whether anybody ever dialled the address.
func (n *Network) Dialled(address string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Contains(n.dialled, address)
}

// Listen makes a host of the address, "name:port".
func (n *Network) Listen(address string) net.Listener {
	n.mu.Lock()
	defer n.mu.Unlock()
	l := &listener{address, make(chan net.Conn), make(chan struct{}), sync.Once{}}
	n.listeners[address] = l
	return l
}

// Serve answers HTTP at the address until the returned function is called, which waits until all of it has ended.
func (n *Network) Serve(address string, h http.Handler) (stop func()) {
	var running sync.WaitGroup
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		running.Add(1)
		defer running.Done()
		// net/http sees a client go away only once the body is read.
		body, _ := io.ReadAll(r.Body)
		r.Body = io.NopCloser(bytes.NewReader(body))
		h.ServeHTTP(w, r)
	}), ErrorLog: log.New(io.Discard, "", 0)}
	l := n.Listen(address)
	running.Go(func() { _ = server.Serve(l) })
	return func() {
		_ = server.Close()
		running.Wait()
	}
}

type listener struct {
	address string
	accept  chan net.Conn
	closed  chan struct{}
	once    sync.Once
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.accept:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *listener) Addr() net.Addr  { return l }
func (l *listener) Network() string { return "memory" }
func (l *listener) String() string  { return l.address }
