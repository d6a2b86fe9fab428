package call

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"syscall"
	"time"

	"github.com/cenkalti/backoff/v5"
)

// Retry calls attempt until it succeeds, fails for good, or ctx ends, and returns the last error as it is where that is an
// answer of the service. Where no usable answer came, it is "key service ADDRESS not reached in 30s: CAUSE"
// (ErrUnreached). Waits are exponential with full jitter from 200 ms to 30 s, or what Retry-After says plus up to a second.
//
// attempt returns the error of net/http, one made by Status, or a final one.
func Retry[T any](ctx context.Context, address string, attempt func() (T, error)) (T, error) {
	start := time.Now()
	var last error
	result, err := backoff.Retry(ctx, func() (T, error) {
		result, err := attempt()
		if err == nil {
			return result, nil
		}
		// An attempt that our own deadline cut short says less than the one before it.
		if last == nil || ctx.Err() == nil {
			last = err
		}
		if !transient(err) {
			return result, backoff.Permanent(err)
		}
		return result, paced(ctx, err)
	}, backoff.WithBackOff(fullJitter()), backoff.WithMaxElapsedTime(0))
	switch {
	case err == nil:
		return result, nil
	case errors.Is(ctx.Err(), context.Canceled):
		return result, fmt.Errorf("key service %s: %w", address, ctx.Err())
	case transient(last) || isTLS(last):
		took := max(time.Since(start).Round(time.Second), time.Second)
		return result, fmt.Errorf("key service %s %w in %s: %s", address, ErrUnreached, took, Cause(last))
	}
	var p *policyError
	if errors.As(err, &p) {
		return result, p // without the URL that net/http puts around it
	}
	return result, err
}

// fullJitter waits between 0 and 200 ms, 400 ms, … 30 s: twice the interval at a randomization of 1.
func fullJitter() backoff.BackOff {
	return &backoff.ExponentialBackOff{
		InitialInterval:     100 * time.Millisecond,
		MaxInterval:         15 * time.Second,
		Multiplier:          2,
		RandomizationFactor: 1,
	}
}

// paced makes the wait of the service's choice out of its Retry-After, and ends the retries where that lies past ctx's
// deadline.
func paced(ctx context.Context, err error) error {
	var s *status
	if !errors.As(err, &s) || s.retryAfter == 0 {
		return err
	}
	wait := s.retryAfter + rand.N(time.Second)
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < wait {
		return backoff.Permanent(err)
	}
	return &backoff.RetryAfterError{Duration: wait}
}

// transient reports whether a second attempt may heal err: no answer or half of one, or one of the statuses for that.
func transient(err error) bool {
	var (
		s *status
		p *policyError
	)
	switch {
	case errors.As(err, &s):
		return s.code >= 500 || s.code == http.StatusRequestTimeout || s.code == http.StatusTooManyRequests
	case errors.As(err, &p), isTLS(err), errors.Is(err, ErrTooLong):
		return false
	}
	return IsWire(err)
}

// IsWire reports whether err is about the way of an answer, not about what a whole answer holds.
func IsWire(err error) bool {
	var (
		wire  *url.Error
		netty net.Error
		errno syscall.Errno
	)
	return errors.As(err, &wire) || errors.As(err, &netty) || errors.As(err, &errno) || errors.Is(err, ErrTooLong) ||
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}

// retryAfter parses both forms of the header, seconds and an HTTP date; 0 for none.
func retryAfter(value string) time.Duration {
	if seconds, err := strconv.Atoi(value); err == nil && seconds > 0 {
		return time.Duration(min(seconds, 24*3600)) * time.Second
	}
	if at, err := http.ParseTime(value); err == nil {
		return max(time.Until(at), 0)
	}
	return 0
}

// Ended is the error for a wait that ctx ended before any attempt was made.
func Ended(ctx context.Context, address, why string) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return fmt.Errorf("key service %s: %w", address, ctx.Err())
	}
	return fmt.Errorf("key service %s %w: %s", address, ErrUnreached, why)
}
