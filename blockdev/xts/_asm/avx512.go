package main

import "fmt"

var sprintf = fmt.Sprintf

// Registers of the 512-bit kernels. A step is 512 bytes: eight registers of four blocks each in states. The tweaks of a
// step are in tweaksA and tweaksB by turns, each xored with the last round key, so that the last AES round applies both.
const (
	states  = 0
	tweaksA = 8
	tweaksB = 16

	roundKey = "Z24"
	poly     = "Z25" // 0x87 in each quadword
	sector   = "Z26" // the sector's first tweak in each lane
	shifted  = "Z27" // the same, its low quadword in the high place and zero in the low
	coming   = "Z28" // first tweaks of four sectors, being encrypted
	current  = "Z29" // first tweaks of four sectors, lane by lane
)

// avx512 writes the kernels for AVX-512 with VAES and VPCLMULQDQ.
//
// The tweaks of step n+1 are computed between the AES rounds of step n. Within a sector of more than 1024 bytes they are
// those of step n-1 times x^64. In the first 1024 bytes they are the sector's first tweak times x^0 to x^63, by shifts of
// as many bits; the bits shifted out are reduced by a carry-less product with 0x87. First tweaks are encrypted four at a
// time, as a ninth column of a step's rounds.
func avx512(f *file) {
	words := make([]uint64, 4*8)
	for row := range 4 {
		for lane := range 4 {
			words[row*8+lane*2] = uint64(lane) << row
		}
	}
	f.data("counters", words)
	for _, c := range ciphers {
		sectors512(f, c)
	}
	for _, c := range ciphers {
		sectorsLong(f, c)
	}
}

const zmmArgs = "(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, counts *shiftCounts, first uint64, size int)"

// begin loads arguments and constants and encrypts the first tweaks of the first four sectors.
func (c cipher) begin(f *file, name string) {
	f.text("func "+name+zmmArgs, "NOSPLIT", 0, 64)
	f.i("MOVQ dst+0(FP), DI")
	f.i("MOVQ src+8(FP), SI")
	f.i("MOVQ sectors+16(FP), BX")
	f.i("MOVQ keys+24(FP), R8")
	f.i("MOVQ tweakKeys+32(FP), R9")
	f.i("MOVQ counts+40(FP), R13")
	f.i("MOVQ first+48(FP), R10")
	f.i("MOVQ size+56(FP), R11")
	f.comment("R12: a row of counters; DX: four sectors in 512-byte units.")
	f.i("SHRQ $9, R11")
	f.i("BSRQ R11, AX")
	f.i("SHLQ $6, AX")
	f.i("LEAQ counters<>(SB), R12")
	f.i("ADDQ AX, R12")
	f.i("LEAQ (R11*4), DX")
	f.i("MOVL $0x55, AX")
	f.i("KMOVW AX, K1")
	f.i("MOVL $0x87, AX")
	f.i("VPBROADCASTQ AX, %s", poly)
	for _, s := range c.firstTweaks() {
		f.i("%s", s)
	}
	f.i("VMOVDQA64 %s, %s", coming, current)
}

// firstTweaks encrypts the next four counters.
func (c cipher) firstTweaks() (l list) {
	l.i("VPBROADCASTQ.Z R10, K1, %s", coming)
	l.i("VPADDQ (R12), %s, %s", coming, coming)
	l.i("ADDQ DX, R10")
	l.i("VPXORQ (R9), %s, %s", coming, coming)
	for r := 1; r < c.rounds; r++ {
		l.i("VAESENC %d(R9), %s, %s", r*64, coming, coming)
	}
	l.i("VAESENCLAST %d(R9), %s, %s", c.rounds*64, coming, coming)
	return l
}

// spread takes one lane of first tweaks as the sector's.
func spread(lane int, from string) (l list) {
	l.i("VSHUFI64X2 $%#x, %s, %s, %s", lane*0x55, from, from, sector)
	l.i("VPSLLDQ $8, %s, %s", sector, shifted)
	return l
}

// expand computes the sector's first tweak times x^from to x^(from+31) into eight registers.
func (c cipher) expand(to, from int) (l list) {
	for i := range 8 {
		row := (from/4 + i) * 64
		tmp := 30 + i%2
		l.i("VPSRLVQ %d(R13), %s, Z%d", shiftRight+row, sector, tmp)
		l.i("VMOVDQA64 %s, Z%d", sector, to+i)
		l.i("VPSHLDVQ %d(R13), %s, Z%d", row, shifted, to+i)
		l.i("VPCLMULQDQ $0x01, %s, Z%d, Z%d", poly, tmp, tmp)
		l.i("VPTERNLOGQ $0x96, %d(R8), Z%d, Z%d", c.rounds*64, tmp, to+i)
	}
	return l
}

// shiftRight is where the second half of shiftCounts begins.
const shiftRight = 1024

// advance multiplies eight registers of tweaks by x^64. With k the last round key, (t^k)·x^64 ^ (k·x^64 ^ k) is
// t·x^64 ^ k.
func advance(to int) (l list) {
	for i := range 8 {
		tmp := 30 + i%2
		l.i("VPCLMULQDQ $0x01, %s, Z%d, Z%d", poly, to+i, tmp)
		l.i("VPSLLDQ $8, Z%d, Z%d", to+i, to+i)
		l.i("VPTERNLOGQ $0x96, %d(R8), Z%d, Z%d", jumpKey, tmp, to+i)
	}
	return l
}

// step encrypts or decrypts 512 bytes at off, with side between the rounds.
func (c cipher) step(f *file, off, tweaks int, side list) {
	f.i("VMOVDQU64 %d(R8), %s", whitenKey, roundKey)
	for i := range 8 {
		f.i("VMOVDQU64 %d(SI), Z%d", off+i*64, states+i)
		f.i("VPTERNLOGQ $0x96, %s, Z%d, Z%d", roundKey, tweaks+i, states+i)
	}
	var rounds list
	for r := 1; r < c.rounds; r++ {
		for i := range 8 {
			if i == 0 {
				rounds.i("VMOVDQU64 %d(R8), %s\n\tV%s %s, Z0, Z0", r*64, roundKey, c.op(), roundKey)
				continue
			}
			rounds.i("V%s %s, Z%d, Z%d", c.op(), roundKey, states+i, states+i)
		}
	}
	f.weave(rounds, side)
	for i := range 8 {
		f.i("V%sLAST Z%d, Z%d, Z%d", c.op(), tweaks+i, states+i, states+i)
		f.i("VMOVDQU64 Z%d, %d(DI)", states+i, off+i*64)
	}
}

// merge spreads b evenly in a.
func merge(a, b list) (l list) {
	done := 0
	for k, s := range a {
		l = append(l, s)
		for ; done < len(b) && done*len(a) < (k+1)*len(b); done++ {
			l = append(l, b[done])
		}
	}
	return l
}

// sectors512 writes the kernel for sectors of 512 bytes. Four sectors are one turn of the loop.
func sectors512(f *file, c cipher) {
	name := c.name("Sectors512AVX512")
	c.begin(f, name)
	for _, s := range append(spread(0, current), c.expand(tweaksA, 0)...) {
		f.i("%s", s)
	}
	f.label("turn")
	for i := range 4 {
		f.comment(sprintf("Sector %d of four.", i))
		now, next := tweaksA, tweaksB
		if i%2 == 1 {
			now, next = next, now
		}
		from, lane := current, i+1
		if i == 3 {
			from, lane = coming, 0
		}
		side := append(spread(lane, from), c.expand(next, 0)...)
		if i == 0 {
			side = merge(side, c.firstTweaks())
		}
		c.step(f, i*512, now, side)
		if i < 3 {
			f.i("DECQ BX")
			f.i("JZ done")
		}
	}
	f.i("VMOVDQA64 %s, %s", coming, current)
	f.i("ADDQ $2048, SI")
	f.i("ADDQ $2048, DI")
	f.i("DECQ BX")
	f.i("JNZ turn")
	f.label("done")
	end(f)
}

// sectorsLong writes the kernel for sectors of 1024, 2048 and 4096 bytes. R11 counts the pairs of steps in a sector after
// the first, CX those left, AX the sectors done.
func sectorsLong(f *file, c cipher) {
	name := c.name("SectorsLongAVX512")
	c.begin(f, name)
	f.i("SHRQ $1, R11")
	f.i("DECQ R11")
	f.i("XORQ AX, AX")
	for _, s := range append(spread(0, current), c.expand(tweaksA, 0)...) {
		f.i("%s", s)
	}
	advancePointers := func() {
		f.i("ADDQ $512, SI")
		f.i("ADDQ $512, DI")
	}
	f.label("sector")
	f.i("TESTQ $3, AX")
	f.i("JNZ plain")
	f.i("CMPQ BX, $4")
	f.i("JBE plain")
	f.comment("First step, with the first tweaks of four sectors to come.")
	c.step(f, 0, tweaksA, merge(c.expand(tweaksB, 32), c.firstTweaks()))
	f.i("JMP inner")
	f.label("plain")
	c.step(f, 0, tweaksA, c.expand(tweaksB, 32))
	f.label("inner")
	advancePointers()
	f.i("MOVQ R11, CX")
	f.i("TESTQ CX, CX")
	f.i("JZ last")
	f.label("pair")
	c.step(f, 0, tweaksB, advance(tweaksA))
	c.step(f, 512, tweaksA, advance(tweaksB))
	f.i("ADDQ $1024, SI")
	f.i("ADDQ $1024, DI")
	f.i("DECQ CX")
	f.i("JNZ pair")
	f.label("last")
	f.i("INCQ AX")
	f.i("VALIGNQ $2, %s, %s, %s", current, current, current)
	f.i("TESTQ $3, AX")
	f.i("JNZ same")
	f.i("VMOVDQA64 %s, %s", coming, current)
	f.label("same")
	c.step(f, 0, tweaksB, append(spread(0, current), c.expand(tweaksA, 0)...))
	advancePointers()
	f.i("DECQ BX")
	f.i("JNZ sector")
	end(f)
}

// end clears what held keys, tweaks or plaintext.
func end(f *file) {
	for z := 16; z < 32; z++ {
		f.i("VPXORQ Z%d, Z%d, Z%d", z, z, z)
	}
	f.comment("Clears the other sixteen, and leaves none of them marked as in use.")
	f.i("VZEROALL")
	f.i("RET")
}

// limit writes the kernel that only measures: what is left of a step when its tweaks are constant.
func limit(f *file) {
	for _, c := range ciphers[2:] {
		f.text("func "+c.name("")+"(dst, src *byte, steps int, keys *[17][64]byte)", "NOSPLIT", 0, 32)
		f.i("MOVQ dst+0(FP), DI")
		f.i("MOVQ src+8(FP), SI")
		f.i("MOVQ steps+16(FP), BX")
		f.i("MOVQ keys+24(FP), R8")
		for i := range 8 {
			f.i("VMOVDQU64 %d(R8), Z%d", c.rounds*64, tweaksA+i)
		}
		f.label("turn")
		c.step(f, 0, tweaksA, nil)
		f.i("ADDQ $512, SI")
		f.i("ADDQ $512, DI")
		f.i("DECQ BX")
		f.i("JNZ turn")
		f.i("VZEROALL")
		f.i("RET")
	}
}
