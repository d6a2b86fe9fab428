package blockdev

import (
	"context"
	"fmt"

	"voldek/blockdev/luks"
)

// Device is a device opened for one volume, its header read and validated, that waits for a key. Its methods must not
// be called concurrently. Whoever opened it closes it, unless Export has taken it over.
type Device struct {
	spec    Spec
	data    *backing
	header  *luks.Header // nil in plain mode
	segment luks.Segment
}

// Open opens the device of spec exclusively and reads its header. Nothing is written to it. Errors: ErrNoDevice and
// luks.ErrNotLUKS, ErrBusy, luks.ErrBadHeader, ErrUsage, or the device's own I/O error.
func Open(spec Spec, limits luks.Limits) (*Device, error) {
	if err := spec.Check(); err != nil {
		return nil, err
	}
	data, err := openBacking(spec.Device, spec.ReadOnly)
	if err != nil {
		return nil, err
	}
	d := &Device{spec: spec, data: data}
	if err := d.readGeometry(limits); err != nil {
		d.Close()
		return nil, fmt.Errorf("%s: %w", spec.Device, err)
	}
	return d, nil
}

func (d *Device) readGeometry(limits luks.Limits) (err error) {
	if d.spec.Type == TypePlain {
		d.segment, err = plainSegment(&d.spec, d.data.size)
		return err
	}
	if d.header, err = readHeader(d.data, d.spec.Header, limits); err != nil {
		return err
	}
	d.segment = d.header.Segment
	return nil
}

// readHeader reads the LUKS header from the data device itself, or from the file detached where that is not empty.
func readHeader(data *backing, detached string, limits luks.Limits) (*luks.Header, error) {
	config := luks.Config{DeviceSize: data.size, Limits: limits}
	if detached == "" {
		return luks.Read(data, data.size, config)
	}
	config.Detached = true
	file, err := openShared(detached, true, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	header, err := luks.Read(file, file.size, config)
	if err != nil {
		return nil, fmt.Errorf("detached header %s: %w", detached, err)
	}
	return header, nil
}

// Inspect reads and validates the header of a device without a claim on it, so that it works on open volumes too.
func Inspect(device, detached string, limits luks.Limits) (*luks.Header, error) {
	data, err := openShared(device, true, 0)
	if err != nil {
		return nil, err
	}
	defer data.Close()
	header, err := readHeader(data, detached, limits)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", device, err)
	}
	return header, nil
}

// plainSegment is the geometry that a plain-mode spec describes on a device of size bytes.
func plainSegment(s *Spec, size int64) (luks.Segment, error) {
	offset := int64(s.Offset) * 512
	length := size - offset
	if length -= length % int64(s.SectorSize); length <= 0 {
		return luks.Segment{}, fmt.Errorf("%w: offset %d lies past the end of the device", ErrUsage, s.Offset)
	}
	return luks.Segment{
		Cipher: s.Cipher, KeySize: s.KeySize / 8, SectorSize: s.SectorSize,
		Offset: offset, Length: length, Dynamic: true, IVTweak: s.Skip,
	}, nil
}

// Header returns the validated LUKS header, nil in plain mode.
func (d *Device) Header() *luks.Header { return d.header }

// Segment returns where the encrypted data lies and how it is encrypted.
func (d *Device) Segment() luks.Segment { return d.segment }

// UUID returns the LUKS UUID in lower case, or "" in plain mode.
func (d *Device) UUID() string {
	if d.header == nil {
		return ""
	}
	return d.header.UUID
}

// Unlock turns a key (the LUKS passphrase, or the key bytes of a plain volume) into the volume key, which the caller
// wipes. The header proves a LUKS key: luks.ErrWrongKey where it opens no slot. Nothing proves a plain one.
func (d *Device) Unlock(ctx context.Context, key []byte, budget *luks.Budget) (*luks.VolumeKey, error) {
	if d.header == nil {
		volumeKey, err := plainKey(d.spec.Hash, key, d.segment.KeySize)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", d.spec.Device, err)
		}
		return &luks.VolumeKey{Key: volumeKey, Keyslot: NoKeyslot}, nil
	}
	volumeKey, err := d.header.Unlock(ctx, key, budget)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", d.spec.Device, err)
	}
	return volumeKey, nil
}

// NoKeyslot is the key slot of a plain volume.
const NoKeyslot = -1

// Close gives the device back. It may be called more than once.
func (d *Device) Close() {
	if d.data != nil {
		_ = d.data.Close()
		d.data = nil
	}
}
