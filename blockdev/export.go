package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
	"voldek/blockdev/dm"
	"voldek/blockdev/fusedev"
	"voldek/internal/secret"
)

// Export is the plaintext of an open volume.
type Export interface {
	// Path is a block device (kernel) or a file (FUSE) that reads and writes plaintext.
	Path() string
	// Via is Kernel or FUSE.
	Via() Via
	// Gone is closed when the export ended without Close; it is nil where only Lost can tell.
	Gone() <-chan struct{}
	// Lost reports whether somebody else, cryptsetup for one, has taken the export down.
	Lost() bool
	// Close flushes and removes the export and gives the device back: an error with exit.Busy while it is in use.
	Close(ctx context.Context) error
	// Abandon ends the service of this process without waiting for users: for its own end. A kernel export stays.
	Abandon()
}

// Export starts the backend that the spec asks for and takes the device over, also when it fails. mountDir is the
// directory under which a FUSE export gets its mount point; it is named after the volume. volumeKey stays the caller's.
func (d *Device) Export(ctx context.Context, volumeKey *secret.Buffer, mountDir string) (Export, error) {
	via, err := d.chooseBackend()
	if err == nil {
		var export Export
		if via == Kernel {
			export, err = d.exportKernel(ctx, volumeKey)
		} else {
			export, err = d.exportFUSE(volumeKey, mountDir)
		}
		if err == nil {
			return export, nil
		}
	}
	d.Close()
	return nil, fmt.Errorf("%s: %w", d.spec.Device, err)
}

// chooseBackend resolves Auto by what this host can do and what the cipher needs.
func (d *Device) chooseBackend() (Via, error) {
	if d.spec.Via != Auto {
		return d.spec.Via, nil
	}
	noKernel := dm.Available()
	if noKernel == nil {
		return Kernel, nil
	}
	noFUSE := d.checkFUSECipher()
	if noFUSE == nil {
		noFUSE = fusedev.Available()
	}
	if noFUSE == nil {
		return FUSE, nil
	}
	return "", fmt.Errorf("%w: %w; %w", ErrNoBackend, noKernel, noFUSE)
}

// checkFUSECipher returns errKernelCipher for a cipher that only the kernel has.
func (d *Device) checkFUSECipher() error {
	if !strings.HasPrefix(d.segment.Cipher, "aes-xts-") {
		return fmt.Errorf("cipher %s %w", d.segment.Cipher, errKernelCipher)
	}
	return nil
}

// kernelExport is a dm-crypt mapping. It outlives this process.
type kernelExport struct{ name, uuid, path string }

func (d *Device) exportKernel(ctx context.Context, volumeKey *secret.Buffer) (Export, error) {
	if err := dm.Available(); err != nil {
		return nil, err
	}
	target, err := d.kernelTarget()
	if err != nil {
		return nil, err
	}
	defer target.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(target.Fd()), &st); err != nil {
		return nil, fmt.Errorf("stat %s: %w", target.Name(), err)
	}
	crypt := dm.Crypt{
		Name:           d.spec.Name,
		UUID:           mappingUUID(d.luksVersion(), d.UUID(), d.spec.Name),
		Device:         fmt.Sprintf("%d:%d", unix.Major(uint64(st.Rdev)), unix.Minor(uint64(st.Rdev))),
		Cipher:         d.segment.Cipher,
		KeyDescription: d.keyDescription(),
		SectorSize:     d.segment.SectorSize,
		IVOffset:       d.segment.IVTweak,
		Offset:         uint64(d.segment.Offset / 512),
		Sectors:        uint64(d.segment.Length / 512),
		ReadOnly:       d.spec.ReadOnly,
		Options:        d.spec.kernelOptions(),
	}
	path, err := dm.Create(ctx, crypt, volumeKey.Bytes())
	if err != nil {
		return nil, err
	}
	d.Close()
	return &kernelExport{name: crypt.Name, uuid: crypt.UUID, path: path}, nil
}

// kernelTarget returns the block device that dm-crypt is to map. Our own exclusive claim on a block device would keep
// dm-crypt out, so it is given up here; dm-crypt makes its own claim when it loads the table.
func (d *Device) kernelTarget() (*os.File, error) {
	if !d.data.id.Block {
		return attachLoop(d.data, d.spec.ReadOnly)
	}
	path := d.data.Name()
	id := d.data.id
	d.Close()
	again, err := openShared(path, true, 0)
	if err != nil {
		return nil, err
	}
	if again.id != id {
		_ = again.Close()
		return nil, fmt.Errorf("%w: it was replaced while it was being opened", ErrNoDevice)
	}
	return again.File, nil
}

// mappingUUID is the dm UUID of a volume, by which a later process finds it again. LUKS version 0 is plain mode.
func mappingUUID(luksVersion int, luksUUID, name string) string {
	if luksVersion == 0 {
		return dm.UUID("PLAIN", "", name)
	}
	return dm.UUID(fmt.Sprintf("LUKS%d", luksVersion), luksUUID, name)
}

func (d *Device) luksVersion() int {
	if d.header == nil {
		return 0
	}
	return d.header.Version
}

// keyDescription names the volume key in the kernel's keyring the way libcryptsetup does for LUKS2.
func (d *Device) keyDescription() string {
	if d.header == nil {
		return "voldek:" + d.spec.Name
	}
	return "cryptsetup:" + d.header.UUID + "-d0"
}

func (e *kernelExport) Path() string          { return e.path }
func (e *kernelExport) Via() Via              { return Kernel }
func (e *kernelExport) Gone() <-chan struct{} { return nil }
func (e *kernelExport) Abandon()              {}

func (e *kernelExport) Lost() bool {
	info, err := dm.Lookup(e.name)
	if err != nil {
		return errors.Is(err, dm.ErrNotFound)
	}
	return info.UUID != e.uuid
}

func (e *kernelExport) Close(ctx context.Context) error {
	if e.Lost() {
		return nil
	}
	return dm.Remove(ctx, e.name)
}

// Adopt finds the kernel export that an earlier process made of this name, as its spec and LUKS UUID (empty in plain
// mode) say. dm.ErrNotFound: there is no such mapping, or another one by that name.
func Adopt(spec Spec, luksVersion int, luksUUID string) (Export, error) {
	uuid := mappingUUID(luksVersion, luksUUID, spec.Name)
	info, err := dm.Lookup(spec.Name)
	if err != nil {
		return nil, err
	}
	if info.UUID != uuid {
		return nil, fmt.Errorf("%w: %s is another mapping now (%s)", dm.ErrNotFound, spec.Name, info.UUID)
	}
	return &kernelExport{name: spec.Name, uuid: uuid, path: "/dev/mapper/" + spec.Name}, nil
}

// fuseExport is a FUSE mount served by this process.
type fuseExport struct {
	*fusedev.Server
	device *Device
	dir    string
}

func (d *Device) exportFUSE(volumeKey *secret.Buffer, mountDir string) (Export, error) {
	dir := filepath.Join(mountDir, d.spec.Name)
	if err := CleanMountPoint(dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	server, err := mountFUSE(d, volumeKey, dir)
	if err != nil {
		_ = os.Remove(dir)
		return nil, err
	}
	return &fuseExport{Server: server, device: d, dir: dir}, nil
}

// MountFUSE exports the volume as dir/volume, where dir is an empty directory of the caller's. It takes the device over,
// also when it fails. It is what a foreground export needs, with no daemon to name the directory.
func (d *Device) MountFUSE(volumeKey *secret.Buffer, dir string) (Export, error) {
	server, err := mountFUSE(d, volumeKey, dir)
	if err != nil {
		d.Close()
		return nil, err
	}
	return &fuseExport{Server: server, device: d}, nil
}

func mountFUSE(d *Device, volumeKey *secret.Buffer, dir string) (*fusedev.Server, error) {
	if err := d.checkFUSECipher(); err != nil {
		return nil, err
	}
	return fusedev.Mount(dir, d.fuseVolume(volumeKey))
}

// fuseVolume describes the volume to fusedev.
func (d *Device) fuseVolume(volumeKey *secret.Buffer) fusedev.Volume {
	return fusedev.Volume{
		Backing:    d.data.File,
		Offset:     d.segment.Offset,
		Size:       d.segment.Length,
		SectorSize: d.segment.SectorSize,
		IVOffset:   d.segment.IVTweak,
		PlainIV:    d.segment.Cipher == "aes-xts-plain",
		Key:        volumeKey.Bytes(),
		ReadOnly:   d.spec.ReadOnly,
		Discard:    d.spec.AllowDiscards,
		Name:       d.spec.Name,
	}
}

// CleanMountPoint removes what a killed process left of a FUSE export: the dead mount and its directory.
func CleanMountPoint(dir string) error {
	if err := fusedev.CleanStale(dir); err != nil {
		return err
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func (e *fuseExport) Via() Via              { return FUSE }
func (e *fuseExport) Gone() <-chan struct{} { return e.Done() }

func (e *fuseExport) Lost() bool {
	select {
	case <-e.Done():
		return true
	default:
		return false
	}
}

func (e *fuseExport) Close(ctx context.Context) error {
	if err := e.Server.Close(ctx); err != nil {
		return err
	}
	e.device.Close()
	e.removeDir()
	return nil
}

func (e *fuseExport) Abandon() {
	_ = e.Abort() // the device stays open: users of the detached mount are served until the process ends
	e.removeDir()
}

func (e *fuseExport) removeDir() {
	if e.dir != "" {
		_ = os.Remove(e.dir)
	}
}
