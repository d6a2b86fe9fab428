package dm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

const controlPath = "/dev/mapper/" + unix.DM_CONTROL_NODE

// udevPrimary marks our uevents as coming from the maker of the device, which Debian's and upstream's 55-dm.rules want to
// see before they trust them: DM_UDEV_PRIMARY_SOURCE_FLAG (0x40) in the upper half of the cookie. The lower half, a
// semaphore to signal, stays empty; the rules then signal nobody.
const udevPrimary = 0x40 << 16

// control is an open /dev/mapper/control.
type control struct {
	fd   int
	call func(fd int, command uint32, buffer []byte) error
}

func openControl() (*control, error) {
	fd, err := unix.Open(controlPath, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrUnavailable, controlPath, err)
	}
	ctl := &control{fd, ioctl}
	if _, err := ctl.do(unix.DM_VERSION, request{}); err != nil {
		ctl.close()
		return nil, fmt.Errorf("%w: %s: %w", ErrUnavailable, controlPath, err)
	}
	return ctl, nil
}

func (ctl *control) close() { _ = unix.Close(ctl.fd) }

// ioctl is the one system call. The kernel reads and writes len(buffer) bytes and keeps no reference to them.
func ioctl(fd int, command uint32, buffer []byte) error {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(command), uintptr(unsafe.Pointer(&buffer[0])))
		switch errno {
		case 0:
			return nil
		case unix.EINTR: // Go's own preemption signals; the kernel did nothing yet
		default:
			return errno
		}
	}
}

// request is what varies in the head of an ioctl, and the payload behind it.
type request struct {
	name, uuid string
	flags      uint32
	event      uint32 // the udev cookie of the uevent this causes
	targets    uint32
	payload    []byte
}

// reply is the head the kernel filled in and the payload it left, at most as long as the buffer.
type reply struct {
	unix.DmIoctl
	payload []byte
}

// wipe clears the payload: a table may hold somebody else's key in hex.
func (r *reply) wipe() { clear(r.payload) }

// do runs one ioctl and lets the kernel clear its copies (DM_SECURE_DATA_FLAG). The caller wipes the reply of a command
// that returns tables. ENXIO, the kernel's word for an unknown name, becomes ErrNotFound.
func (ctl *control) do(command uint32, r request) (reply, error) {
	for size := 16 << 10; ; size *= 4 {
		buffer := r.encode(size)
		err := ctl.call(ctl.fd, command, buffer)
		if errors.Is(err, unix.ENXIO) && r.name != "" {
			err = ErrNotFound
		}
		if err != nil {
			clear(buffer)
			return reply{}, err
		}
		answer, err := decode(buffer)
		if err != nil || answer.Flags&unix.DM_BUFFER_FULL_FLAG == 0 {
			return answer, err
		}
		clear(buffer)
		if size >= 64<<20 {
			return reply{}, errors.New("the answer of device-mapper does not fit 64 MiB")
		}
	}
}

// encode lays the request out in a buffer of at least size bytes: struct dm_ioctl in the machine's byte order, then the
// payload, then room for the answer.
func (r *request) encode(size int) []byte {
	size = max(size, unix.SizeofDmIoctl+len(r.payload))
	head := unix.DmIoctl{
		Version:      [3]uint32{4, 0, 0},
		Data_size:    uint32(size),
		Data_start:   unix.SizeofDmIoctl,
		Target_count: r.targets,
		Flags:        r.flags | unix.DM_SECURE_DATA_FLAG,
		Event_nr:     r.event,
	}
	if copy(head.Name[:len(head.Name)-1], r.name) < len(r.name) || copy(head.Uuid[:len(head.Uuid)-1], r.uuid) < len(r.uuid) {
		panic("dm: name or uuid longer than the kernel's fields")
	}
	buffer := make([]byte, size)
	if _, err := binary.Encode(buffer, binary.NativeEndian, &head); err != nil {
		panic("dm: " + err.Error())
	}
	copy(buffer[unix.SizeofDmIoctl:], r.payload)
	return buffer
}

func decode(buffer []byte) (reply, error) {
	var r reply
	if _, err := binary.Decode(buffer, binary.NativeEndian, &r.DmIoctl); err != nil {
		return reply{}, fmt.Errorf("answer of device-mapper: %w", err)
	}
	if int64(r.Data_start) > int64(len(buffer)) || r.Data_start < unix.SizeofDmIoctl {
		return reply{}, fmt.Errorf("answer of device-mapper: payload at %d of %d bytes", r.Data_start, len(buffer))
	}
	r.payload = buffer[r.Data_start:]
	return r, nil
}

// target is one line of a table: struct dm_target_spec and the parameters of its type.
type target struct {
	start, sectors uint64
	kind           string
	params         []byte // points into the reply's payload
}

// encode lays the target out as the only one of a table. The parameters end in a NUL and are padded to 8 bytes.
func (t *target) encode() []byte {
	size := unix.SizeofDmTargetSpec + (len(t.params)+1+7)&^7
	spec := unix.DmTargetSpec{Sector_start: t.start, Length: t.sectors, Next: uint32(size)}
	copy(spec.Target_type[:len(spec.Target_type)-1], t.kind)
	buffer := make([]byte, size)
	if _, err := binary.Encode(buffer, binary.NativeEndian, &spec); err != nil {
		panic("dm: " + err.Error())
	}
	copy(buffer[unix.SizeofDmTargetSpec:], t.params)
	return buffer
}

// decodeTarget reads the first target of a table in the answer to DM_TABLE_STATUS.
func decodeTarget(payload []byte) (target, error) {
	var spec unix.DmTargetSpec
	if _, err := binary.Decode(payload, binary.NativeEndian, &spec); err != nil {
		return target{}, fmt.Errorf("table of device-mapper: %w", err)
	}
	params := payload[unix.SizeofDmTargetSpec:]
	end := bytes.IndexByte(params, 0)
	if end < 0 {
		return target{}, errors.New("table of device-mapper: parameters without end")
	}
	return target{spec.Sector_start, spec.Length, cString(spec.Target_type[:]), params[:end]}, nil
}

// decodeNames reads the answer to DM_LIST_DEVICES: entries of {dev u64, next u32, name, NUL}, next relative to the entry.
func decodeNames(payload []byte) ([]string, error) {
	var names []string
	for rest := payload; ; {
		if len(rest) < 13 {
			return nil, errors.New("list of device-mapper: entry cut short")
		}
		if binary.NativeEndian.Uint64(rest) == 0 {
			return names, nil // the kernel's way of saying that there are none
		}
		names = append(names, cString(rest[12:]))
		next := binary.NativeEndian.Uint32(rest[8:])
		if next == 0 {
			return names, nil
		}
		if next < 13 || int64(next) > int64(len(rest)) {
			return nil, fmt.Errorf("list of device-mapper: next entry at %d of %d bytes", next, len(rest))
		}
		rest = rest[next:]
	}
}

func cString(field []byte) string {
	if end := bytes.IndexByte(field, 0); end >= 0 {
		field = field[:end]
	}
	return string(field)
}
