package fusedev

import (
	"io"

	"golang.org/x/sys/unix"

	"voldek/blockdev/xts"
)

// Reader reads the plaintext of a volume without a mount. It may be used from several goroutines.
type Reader struct{ disk *disk }

// NewReader returns a Reader of v, which is never written. The caller closes it before the backing file.
func NewReader(v Volume) (*Reader, error) {
	if err := v.check(); err != nil {
		return nil, err
	}
	cipher, err := xts.New(v.Key)
	if err != nil {
		return nil, err
	}
	v.ReadOnly = true
	return &Reader{newDisk(v, cipher)}, nil
}

// ReadAt implements io.ReaderAt: off and len(p) are bytes of plaintext and need no alignment. What the backing file fails
// to give is an error, never zeros.
func (r *Reader) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, unix.EINVAL
	}
	n, err := r.disk.readAt(p, off)
	if err == nil && n < len(p) {
		err = io.EOF
	}
	return n, err
}

// Close wipes the key. The backing file stays the caller's.
func (r *Reader) Close() { r.disk.cipher.Wipe() }
