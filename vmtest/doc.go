// Package vmtest holds the tests of voldek and voldekd against a real kernel's dm-crypt, in a VM, beside cryptsetup and
// dmsetup: what they open we understand, and the other way round. It does not know how the programs work inside.
//
// The host's half (vm_test.go) makes the volumes, writes to them through FUSE, boots the VM with them and reads through
// FUSE what the VM wrote. The guest's half (guest_test.go) is run by it inside the VM.
package vmtest
