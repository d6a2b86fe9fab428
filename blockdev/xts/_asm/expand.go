package main

import "fmt"

// expandKeys writes detection and the AES key schedules (FIPS 197, 5.2), without tables or branches on the key. Each round key is
// stored four times, once for each lane of a 512-bit register.
func expandKeys(f *file) {
	f.text("func cpuid7() (ecx uint32)", "NOSPLIT", 0, 4)
	f.i("MOVL $7, AX")
	f.i("XORL CX, CX")
	f.i("CPUID")
	f.i("MOVL CX, ecx+0(FP)")
	f.i("RET")
	for _, rounds := range []int{10, 14} {
		bits := map[int]int{10: 128, 14: 256}[rounds]
		f.text(fmt.Sprintf("func expandAES%d(k *asmKeys, data, tweak *byte)", bits), "NOSPLIT", 0, 24)
		f.i("MOVQ k+0(FP), DI")
		f.comment("The data key's.")
		f.i("MOVQ data+8(FP), SI")
		f.schedule(rounds, encKeys)
		f.comment("The inverse cipher's (5.3.5).")
		for r := 0; r <= rounds; r++ {
			f.i("MOVOU %d(DI), X0", encKeys+(rounds-r)*64)
			if r > 0 && r < rounds {
				f.i("AESIMC X0, X0")
			}
			f.store(decKeys + r*64)
		}
		f.i("MOVQ $0x87, AX")
		f.i("MOVQ AX, X5")
		for _, keys := range []int{encKeys, decKeys} {
			f.comment("What a kernel would else compute in each call.")
			f.i("MOVOU %d(DI), X0", keys)
			f.i("MOVOU %d(DI), X1", keys+rounds*64)
			f.i("PXOR X1, X0")
			f.store(keys + whitenKey)
			for _, n := range jumps {
				f.i("MOVO X1, X0")
				f.i("MOVO X1, X2")
				f.i("PSRLDQ $%d, X0", 16-n)
				f.i("PSLLDQ $%d, X2", n)
				f.i("PCLMULQDQ $0x00, X5, X0")
				f.i("PXOR X1, X0")
				f.i("PXOR X2, X0")
				f.store(keys + jumpKey(n))
			}
		}
		f.comment("The tweak key's.")
		f.i("MOVQ tweak+16(FP), SI")
		f.schedule(rounds, tweakKeys)
		for x := range 6 {
			f.i("PXOR X%d, X%d", x, x)
		}
		f.i("RET")
	}
}

// store writes X0 to four lanes at off.
func (f *file) store(off int) {
	for lane := range 4 {
		f.i("MOVOU X0, %d(DI)", off+lane*16)
	}
}

// schedule expands the key at SI to off(DI).
func (f *file) schedule(rounds, off int) {
	f.i("MOVOU (SI), X0")
	f.store(off)
	rcon := 1
	if rounds == 10 {
		for r := 1; r <= 10; r++ {
			f.i("AESKEYGENASSIST $%#x, X0, X1", rcon)
			f.nextKey("X0", "$0xff")
			f.store(off + r*64)
			rcon = rcon<<1 ^ rcon>>7*0x11b
		}
		return
	}
	// X0 is the round key to be stored, X2 the one before it.
	f.i("MOVO X0, X2")
	f.i("MOVOU 16(SI), X0")
	f.store(off + 64)
	for r := 2; r <= 14; r++ {
		if r%2 == 0 {
			f.i("AESKEYGENASSIST $%#x, X0, X1", rcon)
			rcon <<= 1
		} else {
			f.i("AESKEYGENASSIST $0, X0, X1")
		}
		f.i("MOVO X0, X4")
		f.i("MOVO X2, X0")
		f.nextKey("X0", map[int]string{0: "$0xff", 1: "$0xaa"}[r%2])
		f.i("MOVO X4, X2")
		f.store(off + r*64)
	}
}

// nextKey makes x, a round key, the one that is a key length later; X1 has the substituted word in the dword that which
// selects.
func (f *file) nextKey(x, which string) {
	f.i("PSHUFD %s, X1, X1", which)
	for range 3 {
		f.i("MOVO %s, X3", x)
		f.i("PSLLDQ $4, X3")
		f.i("PXOR X3, %s", x)
	}
	f.i("PXOR X1, %s", x)
}
