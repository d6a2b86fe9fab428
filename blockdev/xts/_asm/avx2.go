package main

const (
	avx2Table = 2 * 256 // offset in the frame
	avx2Frame = avx2Table + 256
)

// avx2 writes the kernels for VAES and VPCLMULQDQ on 256-bit registers: Y0 to Y7 are the 16 blocks of a step, Y12 is 0x87 in
// each quadword, the rest are free.
//
// The frame holds the tweaks of a step (0 to 255) and of the one to come (256 to 511), by turns, and the first tweaks of 16
// sectors. Within a sector the tweaks to come are those of this step times x^16.
func avx2(f *file) {
	f.data("reduction256", []uint64{0x87})
	for _, c := range ciphers {
		sectorsAVX2(f, c)
	}
}

func sectorsAVX2(f *file, c cipher) {
	f.text("func "+c.name("AVX2")+xmmArgs, "0", avx2Frame+24, 56)
	f.loadArgs(8)
	f.i("VPBROADCASTQ reduction256<>(SB), Y12")
	f.comment("CX: tweaks of this step; R14: of the next; R13: table of first tweaks, AX: place in it.")
	f.i("LEAQ 31(SP), CX")
	f.i("ANDQ $~31, CX")
	f.i("LEAQ 256(CX), R14")
	f.i("LEAQ %d(CX), R13", avx2Table)
	c.fillTable256(f)
	f.i("VBROADCASTI128 (R13), Y8")
	f.i("MOVQ $16, AX")
	for _, s := range expand256("CX") {
		f.i("%s", s)
	}

	f.i("PCALIGN $64")
	f.label("step")
	f.i("DECQ DX")
	f.i("JNZ within")
	f.i("CMPQ BX, $1")
	f.i("JE within")
	f.comment("The next step begins a sector.")
	f.i("MOVQ R11, DX")
	f.i("CMPQ AX, $256")
	f.i("JNE filled")
	c.fillTable256(f)
	f.i("XORQ AX, AX")
	f.label("filled")
	f.i("VBROADCASTI128 (R13)(AX*1), Y8")
	f.i("ADDQ $16, AX")
	c.step256(f, expand256("R14"))
	f.i("JMP next")
	f.label("within")
	c.step256(f, advance256())
	f.label("next")
	f.i("XCHGQ CX, R14")
	f.i("ADDQ $256, SI")
	f.i("ADDQ $256, DI")
	f.i("DECQ BX")
	f.i("JNZ step")

	f.comment("Nothing of keys, tweaks or plaintext stays behind.")
	f.i("VZEROALL")
	for off := 0; off < avx2Frame; off += 32 {
		f.i("VMOVDQU Y0, %d(R13)", off-avx2Table)
	}
	f.i("VZEROUPPER")
	f.i("RET")
}

// step256 encrypts or decrypts 256 bytes, with side between the rounds.
func (c cipher) step256(f *file, side list) {
	f.i("VMOVDQU (R8), Y11")
	for i := range 8 {
		f.i("VPXOR %d(SI), Y11, Y%d", i*32, i)
		f.i("VPXOR %d(CX), Y%d, Y%d", i*32, i, i)
	}
	var rounds list
	for r := 1; r <= c.rounds; r++ {
		op := "V" + c.op()
		if r == c.rounds {
			op += "LAST"
		}
		rounds.i("VMOVDQU %d(R8), Y11", r*64)
		for i := range 8 {
			rounds.i("%s Y11, Y%d, Y%d", op, i, i)
		}
	}
	f.weave(rounds, side)
	for i := range 8 {
		f.i("VPXOR %d(CX), Y%d, Y%d", i*32, i, i)
		f.i("VMOVDQU Y%d, %d(DI)", i, i*32)
	}
}

// fillTable256 encrypts the next 16 counters.
func (c cipher) fillTable256(f *file) {
	f.i("VMOVQ R10, X0")
	f.i("VMOVQ R12, X9")
	f.i("VPADDQ X9, X0, X1")
	f.i("VINSERTI128 $1, X1, Y0, Y0")
	f.i("VPADDQ X9, X9, X9")
	f.i("VINSERTI128 $1, X9, Y9, Y9")
	for i := 1; i < 8; i++ {
		f.i("VPADDQ Y9, Y%d, Y%d", i-1, i)
	}
	f.i("MOVQ R12, AX")
	f.i("SHLQ $4, AX")
	f.i("ADDQ AX, R10")
	f.i("VMOVDQU (R9), Y11")
	for i := range 8 {
		f.i("VPXOR Y11, Y%d, Y%d", i, i)
	}
	for r := 1; r <= c.rounds; r++ {
		op := "VAESENC"
		if r == c.rounds {
			op = "VAESENCLAST"
		}
		f.i("VMOVDQU %d(R9), Y11", r*64)
		for i := range 8 {
			f.i("%s Y11, Y%d, Y%d", op, i, i)
		}
	}
	for i := range 8 {
		f.i("VMOVDQU Y%d, %d(R13)", i, i*32)
	}
}

// advance256 stores the tweaks at CX times x^16 at R14.
func advance256() (l list) {
	for i := range 8 {
		t, p := 8+i%2*5, 9+i%2*5
		l.i("VMOVDQU %d(CX), Y%d", i*32, t)
		l = append(l, bytes256(t, p, 2)...)
		l.i("VMOVDQU Y%d, %d(R14)", p, i*32)
	}
	return l
}

// bytes256 multiplies the tweaks in t by x^n, n in bytes, into p.
func bytes256(t, p, n int) (l list) {
	l.i("VPSRLDQ $%d, Y%d, Y%d", 16-n, t, p)
	l.i("VPCLMULQDQ $0x00, Y12, Y%d, Y%d", p, p)
	l.i("VPSLLDQ $%d, Y%d, Y10", n, t)
	l.i("VPXOR Y10, Y%d, Y%d", p, p)
	return l
}

// expand256 stores the first tweak in both lanes of Y8 times x^0 to x^15.
func expand256(to string) (l list) {
	l.i("VMOVDQA Y8, Y13")
	l = append(l, bits256(1)...)
	l.i("VPBLENDD $0xf0, Y8, Y13, Y8")
	for i := range 4 {
		if i > 0 {
			l = append(l, bits256(2)...)
		}
		l.i("VMOVDQU Y8, %d(%s)", i*32, to)
		l = append(l, bytes256(8, 14, 1)...)
		l.i("VMOVDQU Y14, %d(%s)", (i+4)*32, to)
	}
	return l
}

// bits256 multiplies the tweaks in Y8 by x^n, n in bits.
func bits256(n int) (l list) {
	l.i("VPSRLQ $%d, Y8, Y9", 64-n)
	l.i("VPSLLQ $%d, Y8, Y8", n)
	l.i("VPSLLDQ $8, Y9, Y15")
	l.i("VPCLMULQDQ $0x01, Y12, Y9, Y9")
	l.i("VPXOR Y15, Y8, Y8")
	l.i("VPXOR Y9, Y8, Y8")
	return l
}
