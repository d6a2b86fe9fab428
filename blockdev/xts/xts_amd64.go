//go:build !purego

package xts

import (
	"math/bits"

	"golang.org/x/sys/cpu"
)

// tiers are the implementations this processor can run, the best first.
var tiers = detect()

func detect() []tier {
	t := []tier{generic}
	x := &cpu.X86
	if !x.HasAES || !x.HasPCLMULQDQ {
		return t
	}
	t = append([]tier{aesNI}, t...)
	// That the system saves 256-bit registers (XGETBV) is part of HasAVX2; that there is a leaf 7 follows from it.
	const vaes, vpclmulqdq = 1 << 9, 1 << 10
	if x.HasAVX2 && cpuid7()&(vaes|vpclmulqdq) == vaes|vpclmulqdq {
		t = append([]tier{avx2VAES}, t...)
	}
	if x.HasAVX512F && x.HasAVX512BW && x.HasAVX512VL && x.HasAVX512DQ && x.HasAVX512VBMI2 &&
		x.HasAVX512VAES && x.HasAVX512VPCLMULQDQ {
		t = append([]tier{avx512VAES}, t...)
	}
	return t
}

// constants are what the AVX-512 kernels compute tweaks with, each for all lanes: for n from 0 to 7, n and 64-n, as counts
// of shifts; where the bytes shifted out by 8, 16 and 24 bits go to be reduced by one product; and, for each of these, where
// its part of the product goes.
type constants struct {
	left, right [2][4][2]uint64
	pack        [4][blockSize]byte
	unpack      [3][4][blockSize]byte
}

// shared is on the heap, which aligns it to its size. The assembly needs that for speed, not to be right.
var shared = newConstants()

func newConstants() *constants {
	const none = 0x80 // gives zero
	shuffle := func(from ...byte) (lanes [4][blockSize]byte) {
		for lane := range lanes {
			for i := range lanes[lane] {
				lanes[lane][i] = none
			}
			copy(lanes[lane][:], from)
		}
		return lanes
	}
	c := &constants{
		pack:   shuffle(15, none, 14, 15, none, 13, 14, 15),
		unpack: [3][4][blockSize]byte{shuffle(0, 1), shuffle(2, 3, 4), shuffle(5, 6, 7, 8)},
	}
	for n := range uint64(8) {
		c.left[n/4][n%4] = [2]uint64{n, n}
		c.right[n/4][n%4] = [2]uint64{64 - n, 64 - n}
	}
	return c
}

// crypt cuts the request in pieces for the kernel that fits. The arguments have been checked.
func crypt(t tier, k *schedules, dst, src []byte, sector uint64, sectorSize int, decrypt bool) {
	if t == generic {
		cryptGeneric(k, dst, src, sector, sectorSize, decrypt)
		return
	}
	kernel, longest := int(t), longestCall
	if t != avx512VAES {
		longest /= 4
	}
	s := k.asmKeys()
	keys, tweak := &s.encrypt, &s.tweak
	if decrypt {
		keys, kernel = &s.decrypt, kernel|inverse
	}
	if s.aes256 {
		kernel |= long
	}
	if sectorSize == 512 {
		kernel |= small
	}
	for len(src) > 0 {
		n := min(len(src), longest)
		d, s, sectors := &dst[0], &src[0], n>>bits.TrailingZeros(uint(sectorSize))
		switch kernel {
		case int(aesNI), int(aesNI) | small:
			encryptAES128AESNI(d, s, sectors, keys, tweak, sector, sectorSize)
		case int(aesNI) | inverse, int(aesNI) | inverse | small:
			decryptAES128AESNI(d, s, sectors, keys, tweak, sector, sectorSize)
		case int(aesNI) | long, int(aesNI) | long | small:
			encryptAES256AESNI(d, s, sectors, keys, tweak, sector, sectorSize)
		case int(aesNI) | long | inverse, int(aesNI) | long | inverse | small:
			decryptAES256AESNI(d, s, sectors, keys, tweak, sector, sectorSize)
		case int(avx2VAES), int(avx2VAES) | small:
			encryptAES128AVX2(d, s, sectors, keys, tweak, sector, sectorSize)
		case int(avx2VAES) | inverse, int(avx2VAES) | inverse | small:
			decryptAES128AVX2(d, s, sectors, keys, tweak, sector, sectorSize)
		case int(avx2VAES) | long, int(avx2VAES) | long | small:
			encryptAES256AVX2(d, s, sectors, keys, tweak, sector, sectorSize)
		case int(avx2VAES) | long | inverse, int(avx2VAES) | long | inverse | small:
			decryptAES256AVX2(d, s, sectors, keys, tweak, sector, sectorSize)
		case int(avx512VAES):
			encryptAES128SectorsLongAVX512(d, s, sectors, keys, tweak, shared, sector, sectorSize)
		case int(avx512VAES) | inverse:
			decryptAES128SectorsLongAVX512(d, s, sectors, keys, tweak, shared, sector, sectorSize)
		case int(avx512VAES) | long:
			encryptAES256SectorsLongAVX512(d, s, sectors, keys, tweak, shared, sector, sectorSize)
		case int(avx512VAES) | long | inverse:
			decryptAES256SectorsLongAVX512(d, s, sectors, keys, tweak, shared, sector, sectorSize)
		case int(avx512VAES) | small:
			encryptAES128Sectors512AVX512(d, s, sectors, keys, tweak, shared, sector, sectorSize)
		case int(avx512VAES) | small | inverse:
			decryptAES128Sectors512AVX512(d, s, sectors, keys, tweak, shared, sector, sectorSize)
		case int(avx512VAES) | small | long:
			encryptAES256Sectors512AVX512(d, s, sectors, keys, tweak, shared, sector, sectorSize)
		case int(avx512VAES) | small | long | inverse:
			decryptAES256Sectors512AVX512(d, s, sectors, keys, tweak, shared, sector, sectorSize)
		}
		dst, src = dst[n:], src[n:]
		sector += uint64(n / 512)
	}
}

// Bits of a kernel's number, beside its tier.
const (
	inverse = 8 << iota // decrypts
	long                // AES-256
	small               // sectors of 512 bytes
)

func cpuid7() (ecx uint32)

//go:noescape
func encryptAES128AESNI(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, first uint64, size int)

//go:noescape
func decryptAES128AESNI(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, first uint64, size int)

//go:noescape
func encryptAES256AESNI(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, first uint64, size int)

//go:noescape
func decryptAES256AESNI(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, first uint64, size int)

//go:noescape
func encryptAES128AVX2(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, first uint64, size int)

//go:noescape
func decryptAES128AVX2(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, first uint64, size int)

//go:noescape
func encryptAES256AVX2(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, first uint64, size int)

//go:noescape
func decryptAES256AVX2(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, first uint64, size int)

//go:noescape
func encryptAES128Sectors512AVX512(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, shared *constants, first uint64, size int)

//go:noescape
func decryptAES128Sectors512AVX512(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, shared *constants, first uint64, size int)

//go:noescape
func encryptAES256Sectors512AVX512(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, shared *constants, first uint64, size int)

//go:noescape
func decryptAES256Sectors512AVX512(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, shared *constants, first uint64, size int)

//go:noescape
func encryptAES128SectorsLongAVX512(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, shared *constants, first uint64, size int)

//go:noescape
func decryptAES128SectorsLongAVX512(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, shared *constants, first uint64, size int)

//go:noescape
func encryptAES256SectorsLongAVX512(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, shared *constants, first uint64, size int)

//go:noescape
func decryptAES256SectorsLongAVX512(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, shared *constants, first uint64, size int)
