package main

import "fmt"

// arm64 writes the kernels and the key expansion for the AES instructions of ARMv8: V0 to V7 are the eight blocks of a
// step, V8 to V15 its tweaks, V16 to V23 those of the next, V28 to V31 first tweaks of sectors to come. Tweaks are
// doubled in R10 and R11.
func arm64(f *file) {
	for _, rounds := range []int{10, 14} {
		expandARM64(f, rounds)
	}
	for _, c := range ciphers {
		sectorsARM64(f, c)
	}
}

func sectorsARM64(f *file, c cipher) {
	f.text("func "+c.name("ARM64")+xmmArgs, "NOSPLIT", 0, 56)
	f.i("MOVD dst+0(FP), R0")
	f.i("MOVD src+8(FP), R1")
	f.i("MOVD sectors+16(FP), R2")
	f.i("MOVD keys+24(FP), R3")
	f.i("MOVD tweakKeys+32(FP), R4")
	f.i("MOVD first+40(FP), R5")
	f.i("MOVD size+48(FP), R6")
	f.comment("R6: steps in a sector; R7: its 512-byte units; R2: steps left, R8: those in the sector; R9: first tweaks at hand.")
	f.i("LSR $9, R6, R7")
	f.i("LSR $7, R6, R6")
	f.i("MUL R6, R2, R2")
	f.i("MOVD R6, R8")
	f.i("MOVD $0x87, R13")
	c.firstARM64(f)
	takeARM64(f)
	for _, s := range tweaksARM64(8) {
		f.i("%s", s)
	}

	f.label("step")
	f.i("SUBS $1, R8, R8")
	f.i("BNE same")
	f.i("CMP $1, R2")
	f.i("BEQ same")
	f.comment("The next step begins a sector.")
	f.i("MOVD R6, R8")
	f.i("CBNZ R9, filled")
	c.firstARM64(f)
	f.label("filled")
	takeARM64(f)
	f.label("same")
	f.i("VLD1.P 64(R1), [V0.B16, V1.B16, V2.B16, V3.B16]")
	f.i("VLD1.P 64(R1), [V4.B16, V5.B16, V6.B16, V7.B16]")
	for i := range 8 {
		f.i("VEOR V%d.B16, V%d.B16, V%d.B16", 8+i, i, i)
	}
	op, mix := "AESE", "AESMC"
	if c.decrypt {
		op, mix = "AESD", "AESIMC"
	}
	var rounds list
	for r := range c.rounds {
		rounds.i("FMOVQ %d(R3), F24", r*64)
		for i := range 8 {
			rounds.i("%s V24.B16, V%d.B16", op, i)
			if r < c.rounds-1 {
				rounds.i("%s V%d.B16, V%d.B16", mix, i, i)
			}
		}
	}
	f.weave(rounds, tweaksARM64(16))
	f.i("FMOVQ %d(R3), F24", c.rounds*64)
	for i := range 8 {
		f.i("VEOR V24.B16, V%d.B16, V%d.B16", 8+i, 8+i)
		f.i("VEOR V%d.B16, V%d.B16, V%d.B16", 8+i, i, i)
		f.i("VMOV V%d.B16, V%d.B16", 16+i, 8+i)
	}
	f.i("VST1.P [V0.B16, V1.B16, V2.B16, V3.B16], 64(R0)")
	f.i("VST1.P [V4.B16, V5.B16, V6.B16, V7.B16], 64(R0)")
	f.i("SUBS $1, R2, R2")
	f.i("BNE step")
	clearARM64(f, 10, 11)
	f.i("RET")
}

// firstARM64 encrypts the next four counters.
func (c cipher) firstARM64(f *file) {
	for i := 28; i < 32; i++ {
		f.i("VEOR V%d.B16, V%d.B16, V%d.B16", i, i, i)
		f.i("VMOV R5, V%d.D[0]", i)
		f.i("ADD R7, R5, R5")
	}
	for r := range c.rounds {
		f.i("FMOVQ %d(R4), F24", r*64)
		for i := 28; i < 32; i++ {
			f.i("AESE V24.B16, V%d.B16", i)
			if r < c.rounds-1 {
				f.i("AESMC V%d.B16, V%d.B16", i, i)
			}
		}
	}
	f.i("FMOVQ %d(R4), F24", c.rounds*64)
	for i := 28; i < 32; i++ {
		f.i("VEOR V24.B16, V%d.B16, V%d.B16", i, i)
	}
	f.i("MOVD $4, R9")
}

// takeARM64 makes the first of the first tweaks the running one.
func takeARM64(f *file) {
	f.i("VMOV V28.D[0], R10")
	f.i("VMOV V28.D[1], R11")
	for i := 28; i < 31; i++ {
		f.i("VMOV V%d.B16, V%d.B16", i+1, i)
	}
	f.i("SUB $1, R9, R9")
}

// tweaksARM64 puts the running tweak and its products with x to x^7 into registers, and leaves its product with x^8.
func tweaksARM64(to int) (l list) {
	for i := range 8 {
		l.i("VMOV R10, V%d.D[0]", to+i)
		l.i("VMOV R11, V%d.D[1]", to+i)
		l.i("AND R11->63, R13, R12")
		l.i("EXTR $63, R10, R11, R11")
		l.i("EOR R10<<1, R12, R10")
	}
	return l
}

// expandARM64 writes a key expansion: the last words are in R4 to R11, the word w[i] in R(4 + i mod the key's words).
func expandARM64(f *file, rounds int) {
	bits := map[int]int{10: 128, 14: 256}[rounds]
	n := bits / 32
	f.text(fmt.Sprintf("func expandAES%d(k *asmKeys, data, tweak *byte)", bits), "NOSPLIT", 0, 24)
	f.i("MOVD k+0(FP), R0")
	f.i("VEOR V1.B16, V1.B16, V1.B16")
	schedule := func(off int) {
		rcon := 1
		for i := range 4 * (rounds + 1) {
			now, before := 4+i%n, 4+(i+n-1)%n
			switch {
			case i < n:
				f.i("MOVWU %d(R1), R%d", i*4, now)
			case i%n == 0:
				f.substituteARM64(before)
				f.i("RORW $8, R12, R12")
				f.i("MOVD $%#x, R13", rcon)
				f.i("EORW R13, R12, R12")
				f.i("EORW R12, R%d, R%d", now, now)
				rcon = rcon<<1 ^ rcon>>7*0x11b
			case n == 8 && i%n == 4:
				f.substituteARM64(before)
				f.i("EORW R12, R%d, R%d", now, now)
			default:
				f.i("EORW R%d, R%d, R%d", before, now, now)
			}
			f.i("MOVW R%d, %d(R0)", now, off+i/4*64+i%4*4)
		}
	}
	f.i("MOVD data+8(FP), R1")
	schedule(encKeys)
	f.comment("The inverse cipher's (FIPS 197, 5.3.5).")
	for r := 0; r <= rounds; r++ {
		f.i("FMOVQ %d(R0), F0", encKeys+(rounds-r)*64)
		if r > 0 && r < rounds {
			f.i("AESIMC V0.B16, V0.B16")
		}
		f.i("FMOVQ F0, %d(R0)", decKeys+r*64)
	}
	f.comment("The tweak key's.")
	f.i("MOVD tweak+16(FP), R1")
	schedule(tweakKeys)
	clearARM64(f, 4, 12)
	f.i("RET")
}

// substituteARM64 leaves the S-box of a word in R12. All columns are the same, so shifting rows changes nothing.
func (f *file) substituteARM64(word int) {
	f.i("VDUP R%d, V0.S4", word)
	f.i("AESE V1.B16, V0.B16")
	f.i("VMOV V0.S[0], R12")
}

// clearARM64 clears the vector registers and some others.
func clearARM64(f *file, from, to int) {
	f.comment("Nothing of keys, tweaks or plaintext stays behind.")
	for v := range 32 {
		f.i("VEOR V%d.B16, V%d.B16, V%d.B16", v, v, v)
	}
	for r := from; r <= to; r++ {
		f.i("MOVD ZR, R%d", r)
	}
}
