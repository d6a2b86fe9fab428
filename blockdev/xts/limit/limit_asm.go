//go:build amd64 && !purego

package limit

import "golang.org/x/sys/cpu"

func available() bool { return cpu.X86.HasAVX512F && cpu.X86.HasAVX512VAES }

var keys = new([17][64]byte) // on the heap, which aligns it like the locked page of real ones

func run(dst, src []byte, decrypt bool) {
	if decrypt {
		decryptAES256(&dst[0], &src[0], len(src)/Step, keys)
		return
	}
	encryptAES256(&dst[0], &src[0], len(src)/Step, keys)
}

//go:noescape
func encryptAES256(dst, src *byte, steps int, keys *[17][64]byte)

//go:noescape
func decryptAES256(dst, src *byte, steps int, keys *[17][64]byte)
