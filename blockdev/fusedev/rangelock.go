package fusedev

import "sync"

// rangeLock lets requests that touch the same sectors wait for one another, first come first served; others meet only in
// a mutex held for a few comparisons. Readers of the same sectors do not wait for each other.
type rangeLock struct {
	mu    sync.Mutex
	spans []*span // held and waiting, in the order of arrival
	spare []*span
}

type span struct {
	begin, end int64
	write      bool
	ahead      int           // earlier spans that must go first
	turn       chan struct{} // closed when ahead has become 0; nil if it was from the beginning
}

func (s *span) conflicts(o *span) bool {
	return s.begin < o.end && o.begin < s.end && (s.write || o.write)
}

// lock waits for the range [begin, end), and returns what unlock needs.
func (l *rangeLock) lock(begin, end int64, write bool) *span {
	l.mu.Lock()
	s := l.newSpan()
	*s = span{begin: begin, end: end, write: write}
	for _, earlier := range l.spans {
		if s.conflicts(earlier) {
			s.ahead++
		}
	}
	if s.ahead > 0 {
		s.turn = make(chan struct{})
	}
	l.spans = append(l.spans, s)
	turn := s.turn
	l.mu.Unlock()
	if turn != nil {
		<-turn
	}
	return s
}

func (l *rangeLock) newSpan() *span {
	if len(l.spare) == 0 {
		return new(span)
	}
	s := l.spare[len(l.spare)-1]
	l.spare = l.spare[:len(l.spare)-1]
	return s
}

func (l *rangeLock) unlock(s *span) {
	l.mu.Lock()
	defer l.mu.Unlock()
	at := 0
	for l.spans[at] != s {
		at++
	}
	for _, later := range l.spans[at+1:] {
		if !s.conflicts(later) {
			continue
		}
		if later.ahead--; later.ahead == 0 {
			close(later.turn)
		}
	}
	l.spans = append(l.spans[:at], l.spans[at+1:]...)
	l.spare = append(l.spare, s)
}
