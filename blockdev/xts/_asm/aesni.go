package main

const xmmArgs = "(dst, src *byte, sectors int, keys *roundKeys, tweakKeys *[15][64]byte, first uint64, size int)"

// The frame of a 128-bit kernel: the tweaks of two steps, used by turns, and the first tweaks of eight sectors.
const (
	firstTable = 2 * 128
	tableSize  = 128
	frameSize  = firstTable + tableSize
)

// aesni writes the kernels for processors with AES-NI alone, in 128-bit registers: X0 to X7 are the eight blocks of a step,
// X8 a running tweak, X12 the polynomial, X9 and X11 free.
func aesni(f *file) {
	f.data("polynomial", []uint64{0x87, 1})
	for _, c := range ciphers {
		sectorsAESNI(f, c)
	}
}

// loadArgs loads the arguments of xmmArgs and counts the steps, of 1<<shift bytes each.
func (f *file) loadArgs(shift int) {
	f.i("MOVQ dst+0(FP), DI")
	f.i("MOVQ src+8(FP), SI")
	f.i("MOVQ sectors+16(FP), BX")
	f.i("MOVQ keys+24(FP), R8")
	f.i("MOVQ tweakKeys+32(FP), R9")
	f.i("MOVQ first+40(FP), R10")
	f.i("MOVQ size+48(FP), R11")
	f.comment("R11: steps in a sector; R12: its 512-byte units; BX: steps left, DX: those in the sector.")
	f.i("MOVQ R11, R12")
	f.i("SHRQ $9, R12")
	f.i("SHRQ $%d, R11", shift)
	f.i("IMULQ R11, BX")
	f.i("MOVQ R11, DX")
}

func sectorsAESNI(f *file, c cipher) {
	f.text("func "+c.name("AESNI")+xmmArgs, "0", frameSize+8, 56)
	f.loadArgs(7)
	f.i("MOVOU polynomial<>(SB), X12")
	f.comment("CX: tweaks of this step; R14: of the next; R13: table of first tweaks, AX: place in it.")
	f.i("LEAQ 15(SP), CX")
	f.i("ANDQ $~15, CX")
	f.i("LEAQ 128(CX), R14")
	f.i("LEAQ %d(CX), R13", firstTable)
	c.fillTable(f)
	f.i("MOVOU (R13), X8")
	f.i("MOVQ $16, AX")
	for _, s := range stepTweaks("CX") {
		f.i("%s", s)
	}

	f.label("step")
	f.i("DECQ DX")
	f.i("JNZ same")
	f.i("CMPQ BX, $1")
	f.i("JE same")
	f.comment("The next step begins a sector.")
	f.i("MOVQ R11, DX")
	f.i("CMPQ AX, $%d", tableSize)
	f.i("JNE filled")
	c.fillTable(f)
	f.i("XORQ AX, AX")
	f.label("filled")
	f.i("MOVOU (R13)(AX*1), X8")
	f.i("ADDQ $16, AX")
	f.label("same")
	f.i("MOVOU (R8), X11")
	for i := range 8 {
		f.i("MOVOU %d(SI), X%d", i*16, i)
		f.i("PXOR X11, X%d", i)
		f.i("PXOR %d(CX), X%d", i*16, i)
	}
	var rounds list
	for r := 1; r <= c.rounds; r++ {
		op := c.op()
		if r == c.rounds {
			op += "LAST"
		}
		rounds.i("MOVOU %d(R8), X11", r*64)
		for i := range 8 {
			rounds.i("%s X11, X%d", op, i)
		}
	}
	f.weave(rounds, stepTweaks("R14"))
	for i := range 8 {
		f.i("PXOR %d(CX), X%d", i*16, i)
		f.i("MOVOU X%d, %d(DI)", i, i*16)
	}
	f.i("XCHGQ CX, R14")
	f.i("ADDQ $128, SI")
	f.i("ADDQ $128, DI")
	f.i("DECQ BX")
	f.i("JNZ step")

	f.comment("Nothing of keys, tweaks or plaintext stays behind.")
	for x := range 16 {
		f.i("PXOR X%d, X%d", x, x)
	}
	for off := 0; off < frameSize; off += 16 {
		f.i("MOVOU X0, %d(R13)", off-firstTable)
	}
	f.i("RET")
}

// fillTable encrypts the next eight counters.
func (c cipher) fillTable(f *file) {
	f.i("MOVOU (R9), X11")
	for i := range 8 {
		f.i("MOVQ R10, X%d", i)
		f.i("ADDQ R12, R10")
		f.i("PXOR X11, X%d", i)
	}
	for r := 1; r <= c.rounds; r++ {
		op := "AESENC"
		if r == c.rounds {
			op = "AESENCLAST"
		}
		f.i("MOVOU %d(R9), X11", r*64)
		for i := range 8 {
			f.i("%s X11, X%d", op, i)
		}
	}
	for i := range 8 {
		f.i("MOVOU X%d, %d(R13)", i, i*16)
	}
}

// stepTweaks stores X8 and its products with x to x^7, and leaves X8 times x^8.
func stepTweaks(to string) (l list) {
	for i := range 8 {
		l.i("MOVOU X8, %d(%s)", i*16, to)
		l.i("PSHUFD $0x13, X8, X9")
		l.i("PSRAL $31, X9")
		l.i("PAND X12, X9")
		l.i("PADDQ X8, X8")
		l.i("PXOR X9, X8")
	}
	return l
}
