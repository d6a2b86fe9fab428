package xts

import (
	"crypto/aes"
	"crypto/cipher"
	"fmt"
	"reflect"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// schedules are the two expanded AES keys, in a locked page of their own. For the assembly they are expanded there (see
// asmKeys). The generic tier has them from crypto/aes.
//
// crypto/aes makes an expanded key on the Go heap and gives it no way to be wiped. So it is moved: the value behind the
// cipher.Block is copied into the page, the original is cleared, and a new cipher.Block of the same type is
// made that points into the page. What keeps this right: relocatable checks the very type in use and says yes only for
// a pointer to a struct made of numbers, which a copy of its bytes copies whole; the page is outside the Go heap and
// holds no Go pointer, so the collector need not know of it; it is aligned to its own size, so every field is aligned;
// and it stays mapped until wipe, which no one calls while the schedules are in use. Where the type is anything else
// (another Go version, BoringCrypto), the block stays where crypto/aes put it, and wipe can only drop it. A test fails if
// that is the case with the Go at hand.
type schedules struct {
	page        []byte
	data, tweak cipher.Block // of the generic tier
}

// expand makes the schedules. Where RLIMIT_MEMLOCK does not allow locking they are in plain memory, still left out of core
// dumps: the caller's key is in the same position, and reports it.
func expand(t tier, dataKey, tweakKey []byte) (*schedules, error) {
	page, err := unix.Mmap(-1, 0, unix.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("map memory for key schedules: %w", err)
	}
	_ = unix.Mlock(page)
	_ = unix.Madvise(page, unix.MADV_DONTDUMP)
	_ = unix.Madvise(page, unix.MADV_WIPEONFORK) // since Linux 4.14
	k := &schedules{page: page}
	if t != generic {
		k.expandAsm(dataKey, tweakKey)
		return k, nil
	}
	half := len(page) / 2
	if k.data, err = expandInto(page[:half], dataKey); err == nil {
		k.tweak, err = expandInto(page[half:], tweakKey)
	}
	if err != nil {
		k.wipe()
		return nil, err
	}
	return k, nil
}

func expandInto(room, key []byte) (cipher.Block, error) {
	b, err := aes.NewCipher(key)
	if err != nil || !relocatable(b, len(room)) {
		return b, err
	}
	v := reflect.ValueOf(b)
	original := unsafe.Slice((*byte)(v.UnsafePointer()), v.Type().Elem().Size())
	copy(room, original)
	clear(original)
	runtime.KeepAlive(b)
	return reflect.NewAt(v.Type().Elem(), unsafe.Pointer(&room[0])).Interface().(cipher.Block), nil
}

// relocatable reports whether b can be moved into room bytes.
func relocatable(b cipher.Block, room int) bool {
	t := reflect.TypeOf(b)
	return t.Kind() == reflect.Pointer && t.Elem().Kind() == reflect.Struct &&
		t.Elem().Size() <= uintptr(room) && numbersOnly(t.Elem())
}

func numbersOnly(t reflect.Type) bool {
	switch t.Kind() {
	case reflect.Array:
		return numbersOnly(t.Elem())
	case reflect.Struct:
		for i := range t.NumField() {
			if !numbersOnly(t.Field(i).Type) {
				return false
			}
		}
		return true
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64, reflect.Bool,
		reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return true
	}
	return false
}

func (k *schedules) wipe() {
	clear(k.page)
	_ = unix.Munmap(k.page)
	*k = schedules{}
}
