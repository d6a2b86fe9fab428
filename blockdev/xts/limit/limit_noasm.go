//go:build !amd64 || purego

package limit

func available() bool { return false }

func run(dst, src []byte, decrypt bool) { panic("limit: no kernel for this processor") }
