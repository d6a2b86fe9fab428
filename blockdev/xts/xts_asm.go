//go:build (amd64 || arm64) && !purego

package xts

import "unsafe"

//go:generate sh -c "cd _asm && go run . -out .."

// roundKeys are those of AES in one direction and in the order of use, each four times over, and values that every call
// would else compute: see _asm for their use. On arm64 there is only the first of the four, and none of those values.
type roundKeys struct {
	rounds [15][64]byte
	whiten [64]byte
	jumps  [5][64]byte
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

// longestCall bounds the bytes of one assembly call, for a goroutine in it cannot be preempted: 40 µs with AVX-512.
const longestCall = 1 << 20

//go:noescape
func expandAES128(k *asmKeys, data, tweak *byte)

//go:noescape
func expandAES256(k *asmKeys, data, tweak *byte)
