package luks

import (
	"errors"
	"fmt"
	"io"
)

// snapshot reads a header so that no byte is read twice: what was validated is what is used, whatever the disk answers
// the next time. It keeps one growing prefix; areas beyond it are asked for once each.
type snapshot struct {
	r      io.ReaderAt
	size   int64 // bytes in r
	prefix []byte
}

// upTo returns the first n bytes, fewer where r ends before.
func (s *snapshot) upTo(n int64) ([]byte, error) {
	n = min(n, s.size)
	if have := int64(len(s.prefix)); have < n {
		grown := make([]byte, n)
		copy(grown, s.prefix)
		if err := s.read(grown[have:], have); err != nil {
			return nil, err
		}
		s.prefix = grown
	}
	return s.prefix[:max(n, 0)], nil
}

// area returns n bytes at offset, which must lie inside r. Areas must not overlap each other.
func (s *snapshot) area(offset, n int64) ([]byte, error) {
	p := make([]byte, n)
	have := 0
	if offset < int64(len(s.prefix)) {
		have = copy(p, s.prefix[offset:])
	}
	if err := s.read(p[have:], offset+int64(have)); err != nil {
		return nil, err
	}
	return p, nil
}

func (s *snapshot) read(p []byte, offset int64) error {
	n, err := s.r.ReadAt(p, offset)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read %d bytes of the LUKS header at %d: %w", len(p), offset, err)
}
