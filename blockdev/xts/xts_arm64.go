//go:build !purego

package xts

import "golang.org/x/sys/cpu"

// tiers are the implementations this processor can run, the best first.
var tiers = detect()

func detect() []tier {
	if cpu.ARM64.HasAES {
		return []tier{armAES, generic}
	}
	return []tier{generic}
}

// crypt cuts the request in pieces for the kernel that fits. The arguments have been checked.
func crypt(t tier, k *schedules, dst, src []byte, sector uint64, sectorSize int, decrypt bool) {
	if t == generic {
		cryptGeneric(k, dst, src, sector, sectorSize, decrypt)
		return
	}
	keys := k.asmKeys()
	for len(src) > 0 {
		n := min(len(src), longestCall/4)
		d, s := &dst[0], &src[0]
		switch {
		case keys.aes256 && decrypt:
			decryptAES256ARM64(d, s, n/sectorSize, &keys.decrypt, &keys.tweak, sector, sectorSize)
		case keys.aes256:
			encryptAES256ARM64(d, s, n/sectorSize, &keys.encrypt, &keys.tweak, sector, sectorSize)
		case decrypt:
			decryptAES128ARM64(d, s, n/sectorSize, &keys.decrypt, &keys.tweak, sector, sectorSize)
		default:
			encryptAES128ARM64(d, s, n/sectorSize, &keys.encrypt, &keys.tweak, sector, sectorSize)
		}
		dst, src = dst[n:], src[n:]
		sector += uint64(n / 512)
	}
}

//go:noescape
func encryptAES128ARM64(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, first uint64, size int)

//go:noescape
func decryptAES128ARM64(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, first uint64, size int)

//go:noescape
func encryptAES256ARM64(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, first uint64, size int)

//go:noescape
func decryptAES256ARM64(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, first uint64, size int)
