package xts

import "unsafe"

// overlap reports whether two slices of the same length share memory without beginning at the same byte. Comparing
// addresses as numbers is right because both slices are live, and slices share an address only in the same object.
func overlap(a, b []byte) bool {
	if len(a) == 0 || &a[0] == &b[0] {
		return false
	}
	first, second := uintptr(unsafe.Pointer(&a[0])), uintptr(unsafe.Pointer(&b[0]))
	return first < second+uintptr(len(b)) && second < first+uintptr(len(a))
}
