package main

import "fmt"

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
// The tweaks of step n+1 are computed between the AES rounds of step n. A sector's first step has its first tweak times x^0
// to x^31: two registers by shifts of bits, six from these by shifts of bytes. A second step has those of the first times
// x^32, any later one those of the step before the last times x^64. The bits shifted out are reduced by a carry-less product
// with 0x87, which is dear where several stand together; so they are few and far apart. First tweaks are encrypted four at
// a time, as a ninth column of a step's rounds.
func avx512(f *file) {
	words := make([]uint64, 9*8)
	for _, units := range []int{1, 2, 4, 8} {
		for lane := range 4 {
			words[units*8+lane*2] = uint64(lane * units)
		}
	}
	f.data("counters", words)
	f.data("reduction", []uint64{0x87})
	for _, c := range ciphers {
		sectors512(f, c)
	}
	for _, c := range ciphers {
		sectorsLong(f, c)
	}
}

const zmmArgs = "(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, shared *constants, first uint64, size int)"

// begin loads arguments and constants and encrypts the first tweaks of the first four sectors.
func (c cipher) begin(f *file, name string) {
	f.text("func "+name+zmmArgs, "NOSPLIT", 0, 64)
	f.i("MOVQ dst+0(FP), DI")
	f.i("MOVQ src+8(FP), SI")
	f.i("MOVQ sectors+16(FP), BX")
	f.i("MOVQ keys+24(FP), R8")
	f.i("MOVQ tweakKeys+32(FP), R9")
	f.i("MOVQ shared+40(FP), R13")
	f.i("MOVQ first+48(FP), R10")
	f.i("MOVQ size+56(FP), R11")
	f.comment("R12: the row of counters for the size; DX: four sectors in 512-byte units.")
	f.i("SHRQ $3, R11")
	f.i("LEAQ counters<>(SB), R12")
	f.i("ADDQ R11, R12")
	f.i("MOVQ R11, DX")
	f.i("SHRQ $4, DX")
	f.i("VPBROADCASTQ reduction<>(SB), %s", poly)
	for _, s := range c.firstTweaks() {
		f.i("%s", s)
	}
	f.i("VMOVDQA64 %s, %s", coming, current)
}

// firstTweaks encrypts the next four counters.
func (c cipher) firstTweaks() (l list) {
	l.i("VMOVQ R10, X28") // coming's lowest lane
	l.i("VSHUFI64X2 $0, %s, %s, %s", coming, coming, coming)
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

// expand computes the sector's first tweak times x^0 to x^31 into eight registers: two by shifts of bits, the others from
// these by shifts of bytes.
func (c cipher) expand(to int) (l list) {
	for i := range 2 {
		tmp := 30 + i%2
		l.i("VPSRLVQ %d(R13), %s, Z%d", shiftRight+i*64, sector, tmp)
		l.i("VMOVDQA64 %s, Z%d", sector, to+i)
		l.i("VPSHLDVQ %d(R13), %s, Z%d", i*64, shifted, to+i)
		l.i("VPCLMULQDQ $0x01, %s, Z%d, Z%d", poly, tmp, tmp)
		l.i("VPTERNLOGQ $0x96, %d(R8), Z%d, Z%d", c.rounds*64, tmp, to+i)
	}
	for base := range 2 {
		product := 30 + base
		l.i("VPSHUFB %d(R13), Z%d, Z%d", pack, to+base, product)
		l.i("VPCLMULQDQ $0x00, %s, Z%d, Z%d", poly, product, product)
		for n := 1; n <= 3; n++ {
			tmp, row := roundTemp[n%2], to+base+2*n
			l.i("VPSHUFB %d(R13), Z%d, %s", unpack+(n-1)*64, product, tmp)
			l.i("VPSLLDQ $%d, Z%d, Z%d", n, to+base, row)
			l.i("VPTERNLOGQ $0x96, %d(R8), %s, Z%d", jumpKey(n), tmp, row)
		}
	}
	return l
}

// Offsets into constants, declared in xts_asm.go.
const (
	shiftRight = 2 * 64
	pack       = 4 * 64
	unpack     = 5 * 64
)

// roundTemp are free once the first two registers of tweaks are there.
var roundTemp = []string{sector, shifted}

// jump computes a register of tweaks times x^n, n in bytes. With k the last round key, (t^k)·x^n ^ (k·x^n ^ k) is
// t·x^n ^ k.
func jump(from, to, n int) (l list) {
	tmp := 30 + to%2
	if n < 8 {
		l.i("VPSRLDQ $%d, Z%d, Z%d", 16-n, from, tmp)
		l.i("VPCLMULQDQ $0x00, %s, Z%d, Z%d", poly, tmp, tmp)
	} else {
		l.i("VPCLMULQDQ $0x01, %s, Z%d, Z%d", poly, from, tmp)
	}
	l.i("VPSLLDQ $%d, Z%d, Z%d", n, from, to)
	l.i("VPTERNLOGQ $0x96, %d(R8), Z%d, Z%d", jumpKey(n), tmp, to)
	return l
}

// jump8 is jump for a whole step.
func jump8(from, to, n int) (l list) {
	for i := range 8 {
		l = append(l, jump(from+i, to+i, n)...)
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

// sectors512 writes the kernel for sectors of 512 bytes. Four sectors are one turn of the loop.
func sectors512(f *file, c cipher) {
	name := c.name("Sectors512AVX512")
	c.begin(f, name)
	for _, s := range append(spread(0, current), c.expand(tweaksA)...) {
		f.i("%s", s)
	}
	f.i("PCALIGN $64")
	f.label("turn")
	for i := range 4 {
		f.comment(fmt.Sprintf("Sector %d of four.", i))
		now, next := tweaksA, tweaksB
		if i%2 == 1 {
			now, next = next, now
		}
		from, lane := current, i+1
		if i == 3 {
			from, lane = coming, 0
		}
		side := append(spread(lane, from), c.expand(next)...)
		if i == 0 {
			f.i("CMPQ BX, $4")
			f.i("JBE few")
			c.step(f, i*512, now, merge(side, c.firstTweaks()))
			f.i("DECQ BX")
			f.i("JMP second")
			f.label("few")
		}
		c.step(f, i*512, now, side)
		if i < 3 {
			f.i("DECQ BX")
			f.i("JZ done")
		}
		if i == 0 {
			f.label("second")
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
	f.i("SHRQ $7, R11")
	f.i("DECQ R11")
	f.i("XORQ AX, AX")
	for _, s := range append(spread(0, current), c.expand(tweaksA)...) {
		f.i("%s", s)
	}
	advancePointers := func() {
		f.i("ADDQ $512, SI")
		f.i("ADDQ $512, DI")
	}
	f.i("PCALIGN $64")
	f.label("sector")
	f.i("TESTQ $3, AX")
	f.i("JNZ plain")
	f.i("CMPQ BX, $4")
	f.i("JBE plain")
	f.comment("First step, with the first tweaks of four sectors to come.")
	c.step(f, 0, tweaksA, merge(jump8(tweaksA, tweaksB, 4), c.firstTweaks()))
	f.i("JMP inner")
	f.label("plain")
	c.step(f, 0, tweaksA, jump8(tweaksA, tweaksB, 4))
	f.label("inner")
	advancePointers()
	f.i("MOVQ R11, CX")
	f.i("TESTQ CX, CX")
	f.i("JZ last")
	f.i("PCALIGN $64")
	f.label("pair")
	c.step(f, 0, tweaksB, jump8(tweaksA, tweaksA, 8))
	c.step(f, 512, tweaksA, jump8(tweaksB, tweaksB, 8))
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
	c.step(f, 0, tweaksB, append(spread(0, current), c.expand(tweaksA)...))
	advancePointers()
	f.i("DECQ BX")
	f.i("JNZ sector")
	end(f)
}

// end clears what held keys, tweaks or plaintext.
func end(f *file) {
	for z := range 32 {
		f.i("VPXORQ Z%d, Z%d, Z%d", z, z, z)
	}
	f.i("VZEROUPPER")
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
		f.i("PCALIGN $64")
		f.label("turn")
		c.step(f, 0, tweaksA, nil)
		f.i("ADDQ $512, SI")
		f.i("ADDQ $512, DI")
		f.i("DECQ BX")
		f.i("JNZ turn")
		end(f)
	}
}
