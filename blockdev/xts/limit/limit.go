// Package limit measures what the processor allows AES-256-XTS at most: the loads, the stores and the AES rounds of the
// AVX-512 kernels, with tweaks that never change. It knows no keys and protects nothing; it is for benchmarks alone.
package limit

// Step is what one turn of the kernel works on, in bytes.
const Step = 512

// Available reports whether the processor has what the kernel needs.
func Available() bool { return available() }

// Run puts src through the AES rounds of one direction, into dst, which is of the same length, or src itself. Lengths are
// whole steps; anything else panics, as does a processor without the kernel.
func Run(dst, src []byte, decrypt bool) {
	if len(dst) != len(src) || len(src)%Step != 0 {
		panic("limit: dst and src are not whole steps of one length")
	}
	if len(src) > 0 {
		run(dst, src, decrypt)
	}
}
