package fusedev

import (
	"os"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Node ids never change and handles are all 0, so there is no state to keep: FORGET and RELEASE need nothing.
const (
	rootNode   = fuse.FUSE_ROOT_ID
	volumeNode = 2
)

const (
	attrValid = 3600 // seconds: attributes never change
	blockSize = 4096 // st_blksize
	openFlags = fuse.FOPEN_DIRECT_IO | fuse.FOPEN_PARALLEL_DIRECT_WRITES
)

// filesystem answers all requests but READ and WRITE, which handler takes before they come here. What is not defined below
// is ENOSYS, which makes the kernel do without.
type filesystem struct {
	fuse.RawFileSystem
	disk    *disk
	owner   fuse.Owner
	mounted time.Time
}

func newFilesystem(d *disk) *filesystem {
	return &filesystem{
		RawFileSystem: fuse.NewDefaultRawFileSystem(),
		disk:          d,
		owner:         fuse.Owner{Uid: uint32(os.Geteuid()), Gid: uint32(os.Getegid())},
		mounted:       time.Now(),
	}
}

func (fs *filesystem) String() string { return "voldek" }

// attr describes a node; false if there is no such node.
func (fs *filesystem) attr(node uint64) (a fuse.Attr, ok bool) {
	a = fuse.Attr{Ino: node, Owner: fs.owner, Blksize: blockSize}
	a.SetTimes(&fs.mounted, &fs.mounted, &fs.mounted)
	switch node {
	case rootNode:
		a.Mode, a.Nlink = syscall.S_IFDIR|0o500, 2
		return a, true
	case volumeNode:
		a.Mode, a.Nlink = syscall.S_IFREG|0o600, 1
		if fs.disk.readOnly {
			a.Mode = syscall.S_IFREG | 0o400
		}
		a.Size, a.Blocks = uint64(fs.disk.size), uint64(fs.disk.size)/512
		return a, true
	}
	return a, false
}

func (fs *filesystem) Lookup(_ <-chan struct{}, header *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if header.NodeId != rootNode || name != fileName {
		return fuse.ENOENT
	}
	out.NodeId, out.EntryValid, out.AttrValid = volumeNode, attrValid, attrValid
	out.Attr, _ = fs.attr(volumeNode)
	return fuse.OK
}

func (fs *filesystem) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	attr, ok := fs.attr(in.NodeId)
	if !ok {
		return fuse.ENOENT
	}
	out.AttrValid, out.Attr = attrValid, attr
	return fuse.OK
}

// SetAttr allows what changes nothing: the size the volume has, and times, which are not kept.
func (fs *filesystem) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	attr, ok := fs.attr(in.NodeId)
	switch {
	case !ok:
		return fuse.ENOENT
	case in.Valid&(fuse.FATTR_MODE|fuse.FATTR_UID|fuse.FATTR_GID) != 0:
		return fuse.EPERM
	case in.Valid&fuse.FATTR_SIZE != 0 && in.Size != attr.Size:
		return fuse.EPERM
	}
	out.AttrValid, out.Attr = attrValid, attr
	return fuse.OK
}

func (fs *filesystem) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	switch {
	case in.NodeId != volumeNode:
		return fuse.ENOENT
	case fs.disk.readOnly && in.Flags&syscall.O_ACCMODE != syscall.O_RDONLY:
		return fuse.EROFS
	}
	out.OpenFlags = openFlags
	return fuse.OK
}

func (fs *filesystem) Fsync(<-chan struct{}, *fuse.FsyncIn) fuse.Status {
	return status(fs.disk.sync())
}

func (fs *filesystem) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	if in.NodeId != volumeNode || in.Mode != unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE {
		return fuse.Status(unix.EOPNOTSUPP)
	}
	return status(fs.disk.punch(int64(in.Offset), int64(in.Length)))
}

func (fs *filesystem) OpenDir(_ <-chan struct{}, in *fuse.OpenIn, _ *fuse.OpenOut) fuse.Status {
	if in.NodeId != rootNode {
		return fuse.ENOTDIR
	}
	return fuse.OK
}

func (fs *filesystem) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	entries := []fuse.DirEntry{
		{Name: ".", Ino: rootNode, Mode: syscall.S_IFDIR, Off: 1},
		{Name: "..", Ino: rootNode, Mode: syscall.S_IFDIR, Off: 2},
		{Name: fileName, Ino: volumeNode, Mode: syscall.S_IFREG, Off: 3},
	}
	for _, e := range entries[min(in.Offset, uint64(len(entries))):] {
		if !out.AddDirEntry(e) {
			break
		}
	}
	return fuse.OK
}

func (fs *filesystem) FsyncDir(<-chan struct{}, *fuse.FsyncIn) fuse.Status { return fuse.OK }

func (fs *filesystem) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	*out = fuse.StatfsOut{
		Blocks: uint64(fs.disk.size) / blockSize, Bsize: blockSize, Frsize: blockSize, Files: 1, NameLen: 255,
	}
	return fuse.OK
}

func status(err error) fuse.Status {
	if err == nil {
		return fuse.OK
	}
	return fuse.Status(errno(err))
}
