package fusedev

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
)

// Whatever the order, a writer is alone in each of its sectors, and readers only among readers.
func TestRangeLockExcludes(t *testing.T) {
	const sectors = 16
	var l rangeLock
	var inside [sectors]atomic.Int32 // readers, or -1 for a writer
	var all sync.WaitGroup
	for g := range 12 {
		all.Go(func() {
			r := rand.New(rand.NewPCG(uint64(g), 1))
			for range 3000 {
				begin := r.Int64N(sectors)
				end := begin + 1 + r.Int64N(sectors-begin)
				write := r.IntN(2) == 0
				s := l.lock(begin, end, write)
				for i := begin; i < end; i++ {
					if write && !inside[i].CompareAndSwap(0, -1) || !write && inside[i].Add(1) <= 0 {
						t.Errorf("sector %d is in use", i)
						return
					}
				}
				for i := begin; i < end; i++ {
					if write {
						inside[i].Store(0)
					} else {
						inside[i].Add(-1)
					}
				}
				l.unlock(s)
			}
		})
	}
	all.Wait()
	if len(l.spans) != 0 {
		t.Errorf("%d spans are left", len(l.spans))
	}
}

// Requests that do not touch wait for nothing, those that do are served in the order they came: a stream of readers does
// not keep a writer out.
func TestRangeLockOrder(t *testing.T) {
	var l rangeLock
	reader := l.lock(0, 8, false)
	other := l.lock(8, 16, true)
	second := l.lock(4, 8, false) // shares with the first
	order := make(chan string)
	writer := make(chan *span)
	go func() {
		s := l.lock(0, 4, true)
		order <- "writer"
		writer <- s
	}()
	waitFor(t, func() bool { return l.queued() == 4 })
	go func() {
		s := l.lock(0, 2, false)
		order <- "late reader"
		l.unlock(s)
	}()
	waitFor(t, func() bool { return l.queued() == 5 })
	l.unlock(other)
	l.unlock(second)
	select {
	case who := <-order:
		t.Fatalf("%s went ahead of a reader in its sectors", who)
	default:
	}
	l.unlock(reader)
	if who := <-order; who != "writer" {
		t.Fatalf("%s went first", who)
	}
	l.unlock(<-writer)
	<-order
}

func (l *rangeLock) queued() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.spans)
}
