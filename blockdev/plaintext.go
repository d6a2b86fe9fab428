package blockdev

import (
	"context"
	"fmt"
	"io"

	"voldek/blockdev/fusedev"
	"voldek/internal/secret"
)

// copyChunk is how much plaintext WritePlaintext holds at a time, in bytes; a multiple of every sector size.
const copyChunk = 1 << 20

// WritePlaintext decrypts length bytes from offset, both in bytes of the plaintext and inside it, and writes them to w. It
// needs neither dm-crypt nor FUSE. An I/O error of the device ends it: nothing is made up for what could not be read.
func (d *Device) WritePlaintext(ctx context.Context, w io.Writer, volumeKey *secret.Buffer, offset, length int64) error {
	if err := d.checkFUSECipher(); err != nil {
		return fmt.Errorf("%s: %w", d.spec.Device, err)
	}
	reader, err := fusedev.NewReader(d.fuseVolume(volumeKey))
	if err != nil {
		return fmt.Errorf("%s: %w", d.spec.Device, err)
	}
	defer reader.Close()
	chunk, err := secret.New(copyChunk)
	if err != nil {
		return err
	}
	defer chunk.Wipe()
	for length > 0 && ctx.Err() == nil {
		part := chunk.Bytes()[:min(length, copyChunk-offset%copyChunk)]
		if _, err := reader.ReadAt(part, offset); err != nil {
			return fmt.Errorf("%s: read at %d: %w", d.spec.Device, offset, err)
		}
		if _, err := w.Write(part); err != nil {
			return err
		}
		offset, length = offset+int64(len(part)), length-int64(len(part))
	}
	return ctx.Err()
}
