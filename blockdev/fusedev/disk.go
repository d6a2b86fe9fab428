package fusedev

import (
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"voldek/blockdev/xts"
)

// disk reads and writes a volume's plaintext at any offset and length. It may be used from several goroutines: requests
// that touch the same sectors are ordered, so that a sector is never read half written, and two writers of different
// bytes in it do not undo each other.
type disk struct {
	backing           *os.File
	offset, size      int64
	sectorSize        int
	ivOffset          uint64
	plainIV           bool
	readOnly, discard bool
	cipher            *xts.Cipher
	locks             rangeLock
	scratch           sync.Pool // *[4096]byte, aligned as O_DIRECT wants; cleared before it is put back

	flush     func() error // fdatasync of the backing
	flushing  sync.Mutex
	started   atomic.Uint64 // flushes begun
	completed uint64        // number of the last flush that ended, under flushing
	failed    error         // of the first flush that failed, under flushing
}

func newDisk(v Volume, cipher *xts.Cipher) *disk {
	d := &disk{
		backing: v.Backing, offset: v.Offset, size: v.Size, sectorSize: v.SectorSize, ivOffset: v.IVOffset,
		plainIV: v.PlainIV, readOnly: v.ReadOnly, discard: v.Discard, cipher: cipher,
	}
	d.flush = func() error { return unix.Fdatasync(int(d.backing.Fd())) }
	d.scratch.New = func() any { return alignedPage() }
	return d
}

// readAt reads plaintext. It is short only at the end of the volume.
func (d *disk) readAt(p []byte, off int64) (n int, err error) {
	if off >= d.size {
		return 0, nil
	}
	p = p[:min(int64(len(p)), d.size-off)]
	lock := d.locks.lock(d.sectorsOf(off, len(p), false))
	defer d.locks.unlock(lock)
	return d.read(p, off)
}

// read reads what lies within the volume, in a range that is locked.
func (d *disk) read(p []byte, off int64) (n int, err error) {
	for n < len(p) {
		piece, skip := d.piece(p[n:], off+int64(n))
		if len(piece)%d.sectorSize == 0 {
			err = d.load(piece, off+int64(n))
		} else {
			err = d.withSector(off+int64(n-skip), func(sector []byte) error {
				copy(piece, sector[skip:])
				return nil
			})
		}
		if err != nil {
			return 0, err
		}
		n += len(piece)
	}
	return n, nil
}

// writeAt writes plaintext and overwrites p with ciphertext or zeros. It is short only at the end of the volume; behind
// the end it is ENOSPC.
func (d *disk) writeAt(p []byte, off int64) (n int, err error) {
	if d.readOnly {
		return 0, unix.EROFS
	}
	if off >= d.size {
		return 0, unix.ENOSPC
	}
	p = p[:min(int64(len(p)), d.size-off)]
	lock := d.locks.lock(d.sectorsOf(off, len(p), true))
	defer d.locks.unlock(lock)
	return d.write(p, off)
}

// write writes what lies within the volume, in a range that is locked for writing.
func (d *disk) write(p []byte, off int64) (n int, err error) {
	for n < len(p) {
		piece, skip := d.piece(p[n:], off+int64(n))
		at := off + int64(n-skip)
		if len(piece)%d.sectorSize == 0 {
			err = d.store(piece, at)
		} else {
			err = d.withSector(at, func(sector []byte) error {
				copy(sector[skip:], piece)
				clear(piece)
				return d.store(sector, at)
			})
		}
		if err != nil {
			return 0, err
		}
		n += len(piece)
	}
	return n, nil
}

// sectorsOf rounds a range to the sectors it touches.
func (d *disk) sectorsOf(off int64, n int, write bool) (begin, end int64, forWriting bool) {
	s := int64(d.sectorSize)
	return off / s * s, (off + int64(n) + s - 1) / s * s, write
}

// piece is the part of p that is handled next: all its whole sectors if off is the beginning of one, otherwise what lies
// in the sector of off, skip bytes into it.
func (d *disk) piece(p []byte, off int64) (piece []byte, skip int) {
	skip = int(off % int64(d.sectorSize))
	if whole := len(p) / d.sectorSize * d.sectorSize; skip == 0 && whole > 0 {
		return p[:whole], 0
	}
	return p[:min(len(p), d.sectorSize-skip)], skip
}

// withSector calls f with the plaintext of the sector at off.
func (d *disk) withSector(off int64, f func(sector []byte) error) error {
	page := d.scratch.Get().(*[4096]byte)
	defer d.scratch.Put(page)
	defer clear(page[:])
	sector := page[:d.sectorSize]
	if err := d.load(sector, off); err != nil {
		return err
	}
	return f(sector)
}

// load reads and decrypts whole sectors. A backing file that ends too early is EIO: what is missing is never zeros.
func (d *disk) load(p []byte, off int64) error {
	if _, err := d.backing.ReadAt(p, d.offset+off); err != nil {
		clear(p)
		if err == io.EOF {
			return unix.EIO
		}
		return err
	}
	d.crypt(p, off, d.cipher.Decrypt)
	return nil
}

// store encrypts whole sectors where they lie, and writes them.
func (d *disk) store(p []byte, off int64) error {
	d.crypt(p, off, d.cipher.Encrypt)
	_, err := d.backing.WriteAt(p, d.offset+off)
	return err
}

func (d *disk) crypt(p []byte, off int64, f func(dst, src []byte, firstSector uint64, sectorSize int)) {
	sector := uint64(off)/512 + d.ivOffset
	if !d.plainIV {
		f(p, p, sector, d.sectorSize)
		return
	}
	// A counter of 32 bits: a run goes up to the sector where it turns over.
	step := uint64(d.sectorSize / 512)
	for len(p) > 0 {
		sector = uint64(uint32(sector))
		sectors := min((1<<32-sector+step-1)/step, uint64(len(p)/d.sectorSize))
		run := p[:int(sectors)*d.sectorSize]
		f(run, run, sector, d.sectorSize)
		p = p[len(run):]
		sector += sectors * step
	}
}

// sync makes what was written durable. Once it has failed it fails for ever, with the same error: Linux drops the pages it
// could not write and reports that once, so a later success would be a lie. One flush serves all who asked before it began.
func (d *disk) sync() error { return d.syncSince(d.started.Load()) }

// syncSince is sync for who asked when begun flushes had begun.
func (d *disk) syncSince(begun uint64) error {
	d.flushing.Lock()
	defer d.flushing.Unlock()
	if d.failed != nil {
		return d.failed
	}
	if d.completed > begun {
		return nil
	}
	number := d.started.Add(1)
	d.failed = d.flush()
	d.completed = number
	return d.failed
}

// punch discards the sectors that lie within the range as a whole.
func (d *disk) punch(off, n int64) error {
	switch {
	case !d.discard:
		return unix.EOPNOTSUPP
	case d.readOnly:
		return unix.EROFS
	case off < 0 || n <= 0 || off > d.size:
		return unix.EINVAL
	}
	s := int64(d.sectorSize)
	begin, end := (off+s-1)/s*s, (off+min(n, d.size-off))/s*s
	if begin >= end {
		return nil
	}
	lock := d.locks.lock(begin, end, true)
	defer d.locks.unlock(lock)
	return d.discardBacking(d.offset+begin, end-begin)
}

// errno is the error number to tell the kernel.
func errno(err error) unix.Errno {
	var no unix.Errno
	if errors.As(err, &no) && no != 0 {
		return no
	}
	return unix.EIO
}
