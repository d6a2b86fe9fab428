//go:build amd64 && !purego

package xts

import (
	"unsafe"

	"golang.org/x/sys/cpu"
)

//go:generate sh -c "cd _asm && go run . -out .."

// tiers are the implementations this processor can run, the best first.
var tiers = detect()

func detect() []tier {
	t := []tier{generic}
	x := &cpu.X86
	if !x.HasAES || !x.HasPCLMULQDQ {
		return t
	}
	t = append([]tier{aesNI}, t...)
	if x.HasAVX512F && x.HasAVX512BW && x.HasAVX512VL && x.HasAVX512DQ && x.HasAVX512VBMI2 &&
		x.HasAVX512VAES && x.HasAVX512VPCLMULQDQ {
		t = append([]tier{avx512VAES}, t...)
	}
	return t
}

// roundKeys are those of AES in one direction and in the order of use, each four times over, and two values that every
// call would else compute: see _asm for their use.
type roundKeys struct {
	rounds [15][64]byte
	whiten [64]byte
	jump   [64]byte
}

// asmKeys is the locked page as the assembly sees it, which relies on this layout.
type asmKeys struct {
	encrypt, decrypt roundKeys
	tweak            [15][64]byte
	aes256           bool
}

func (k *schedules) asmKeys() *asmKeys { return (*asmKeys)(unsafe.Pointer(&k.page[0])) }

func (k *schedules) expandAsm(data, tweak []byte) {
	keys := k.asmKeys()
	keys.aes256 = len(data) == 32
	if keys.aes256 {
		expandAES256(keys, &data[0], &tweak[0])
		return
	}
	expandAES128(keys, &data[0], &tweak[0])
}

// shiftCounts are, for n from 0 to 63, n and 64-n, each twice.
type shiftCounts struct{ left, right [64][2]uint64 }

var counts = newShiftCounts()

func newShiftCounts() *shiftCounts {
	c := new(shiftCounts)
	for n := range uint64(64) {
		c.left[n] = [2]uint64{n, n}
		c.right[n] = [2]uint64{64 - n, 64 - n}
	}
	return c
}

// longestCall bounds the bytes of one assembly call, for a goroutine in it cannot be preempted: 40 µs with AVX-512.
const longestCall = 1 << 20

// crypt cuts the request in pieces for the kernel that fits. The arguments have been checked.
func crypt(t tier, k *schedules, dst, src []byte, sector uint64, sectorSize int, decrypt bool) {
	if t == generic {
		cryptGeneric(k, dst, src, sector, sectorSize, decrypt)
		return
	}
	longest := longestCall
	if t != avx512VAES {
		longest /= 4
	}
	for len(src) > 0 {
		n := min(len(src), longest)
		k.asmKeys().crypt(t, &dst[0], &src[0], n/sectorSize, sector, sectorSize, decrypt)
		dst, src = dst[n:], src[n:]
		sector += uint64(n / 512)
	}
}

func (k *asmKeys) crypt(t tier, dst, src *byte, sectors int, first uint64, size int, decrypt bool) {
	keys, tweak := &k.encrypt, &k.tweak
	if decrypt {
		keys = &k.decrypt
	}
	switch {
	case t == aesNI && k.aes256 && decrypt:
		decryptAES256AESNI(dst, src, sectors, keys, tweak, first, size)
	case t == aesNI && k.aes256:
		encryptAES256AESNI(dst, src, sectors, keys, tweak, first, size)
	case t == aesNI && decrypt:
		decryptAES128AESNI(dst, src, sectors, keys, tweak, first, size)
	case t == aesNI:
		encryptAES128AESNI(dst, src, sectors, keys, tweak, first, size)
	case size == 512 && k.aes256 && decrypt:
		decryptAES256Sectors512AVX512(dst, src, sectors, keys, tweak, counts, first, size)
	case size == 512 && k.aes256:
		encryptAES256Sectors512AVX512(dst, src, sectors, keys, tweak, counts, first, size)
	case size == 512 && decrypt:
		decryptAES128Sectors512AVX512(dst, src, sectors, keys, tweak, counts, first, size)
	case size == 512:
		encryptAES128Sectors512AVX512(dst, src, sectors, keys, tweak, counts, first, size)
	case k.aes256 && decrypt:
		decryptAES256SectorsLongAVX512(dst, src, sectors, keys, tweak, counts, first, size)
	case k.aes256:
		encryptAES256SectorsLongAVX512(dst, src, sectors, keys, tweak, counts, first, size)
	case decrypt:
		decryptAES128SectorsLongAVX512(dst, src, sectors, keys, tweak, counts, first, size)
	default:
		encryptAES128SectorsLongAVX512(dst, src, sectors, keys, tweak, counts, first, size)
	}
}

//go:noescape
func expandAES128(k *asmKeys, data, tweak *byte)

//go:noescape
func expandAES256(k *asmKeys, data, tweak *byte)

//go:noescape
func encryptAES128AESNI(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, first uint64, size int)

//go:noescape
func decryptAES128AESNI(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, first uint64, size int)

//go:noescape
func encryptAES256AESNI(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, first uint64, size int)

//go:noescape
func decryptAES256AESNI(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, first uint64, size int)

//go:noescape
func encryptAES128Sectors512AVX512(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, counts *shiftCounts, first uint64, size int)

//go:noescape
func decryptAES128Sectors512AVX512(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, counts *shiftCounts, first uint64, size int)

//go:noescape
func encryptAES256Sectors512AVX512(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, counts *shiftCounts, first uint64, size int)

//go:noescape
func decryptAES256Sectors512AVX512(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, counts *shiftCounts, first uint64, size int)

//go:noescape
func encryptAES128SectorsLongAVX512(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, counts *shiftCounts, first uint64, size int)

//go:noescape
func decryptAES128SectorsLongAVX512(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, counts *shiftCounts, first uint64, size int)

//go:noescape
func encryptAES256SectorsLongAVX512(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, counts *shiftCounts, first uint64, size int)

//go:noescape
func decryptAES256SectorsLongAVX512(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, counts *shiftCounts, first uint64, size int)
