package fusedev

import (
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"

	"golang.org/x/sys/unix"
)

// The uses of unsafe, in one file. What keeps them right: the slices are longer than what is pointed to, as each caller
// or check beside it shows; they are aligned to 8 bytes, being parts of page-aligned mappings; and the structures hold
// numbers only.

// alignedPage returns 4 KiB whose address is a multiple of 4096.
func alignedPage() *[4096]byte {
	room := make([]byte, 2*4096)
	skip := -uintptr(unsafe.Pointer(&room[0])) % 4096
	return (*[4096]byte)(room[skip:])
}

// discardBacking drops a range of the backing device or file.
func (d *disk) discardBacking(off, n int64) error {
	fd := int(d.backing.Fd())
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return err
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFBLK {
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	}
	byteRange := [2]uint64{uint64(off), uint64(n)}
	_, _, no := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKDISCARD, uintptr(unsafe.Pointer(&byteRange)))
	if no != 0 {
		return no
	}
	return nil
}

const writeOutSize = int(unsafe.Sizeof(fuse.WriteOut{}))

// These read and make the protocol's structures in a buffer, which has room for each of them.
func header(p []byte) *fuse.InHeader { return (*fuse.InHeader)(unsafe.Pointer(&p[:inHeaderSize][0])) }
func readIn(p []byte) *fuse.ReadIn   { return (*fuse.ReadIn)(unsafe.Pointer(&p[:ioHeaderSize][0])) }
func writeIn(p []byte) *fuse.WriteIn { return (*fuse.WriteIn)(unsafe.Pointer(&p[:ioHeaderSize][0])) }
func outHeader(p []byte) *fuse.OutHeader {
	return (*fuse.OutHeader)(unsafe.Pointer(&p[:outHeaderSize][0]))
}
func writeOut(p []byte) *fuse.WriteOut { return (*fuse.WriteOut)(unsafe.Pointer(&p[:writeOutSize][0])) }
