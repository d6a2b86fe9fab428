//go:build amd64 && !purego

package xts

import (
	"cmp"
	"crypto/aes"
	"fmt"
	"runtime"
	"slices"
	"testing"
	"time"

	oracle "golang.org/x/crypto/xts"
	"golang.org/x/sys/unix"

	"voldek/blockdev/xts/limit"
)

// threadTime is the processor time of this thread, which others on the machine do not lengthen much.
func threadTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		panic(err)
	}
	return time.Duration(ts.Nano())
}

func median[T cmp.Ordered](v []T) T {
	v = slices.Clone(v)
	slices.Sort(v)
	return v[len(v)/2]
}

// BenchmarkLimit prints GB/s and the ratio to LIMIT of every tier and of x/crypto, in place in the cache. They run by turns
// within each repetition; shown is the median of the repetitions' ratios. Run it with -bench Limit -benchtime 1x.
func BenchmarkLimit(b *testing.B) {
	if !limit.Available() {
		b.Skip("needs AVX-512 with VAES")
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for b.Loop() {
		for _, size := range []int{512, 4096} {
			for _, request := range []int{4 << 10, 128 << 10, 1 << 20} {
				for _, decrypt := range []bool{false, true} {
					againstLimit(b, size, request, decrypt)
				}
			}
		}
	}
}

// againstLimit works through whole requests, one call each.
func againstLimit(b *testing.B, size, request int, decrypt bool) {
	type candidate struct {
		name string
		run  func(p []byte)
		slow int // how many times fewer requests than LIMIT does
	}
	candidates := []candidate{{"LIMIT", func(p []byte) { limit.Run(p, p, decrypt) }, 1}}
	key := random(10, 64)
	for _, implementation := range tiers {
		use(b, implementation)
		c := newCipher(b, key)
		run := func(p []byte) { c.Encrypt(p, p, 0xfffffff0, size) }
		if decrypt {
			run = func(p []byte) { c.Decrypt(p, p, 0xfffffff0, size) }
		}
		candidates = append(candidates, candidate{implementation.String(), run, map[tier]int{avx512VAES: 1, avx2VAES: 2, aesNI: 4, generic: 32}[implementation]})
	}
	ref, err := oracle.NewCipher(aes.NewCipher, key)
	if err != nil {
		b.Fatal(err)
	}
	one := ref.Encrypt
	if decrypt {
		one = ref.Decrypt
	}
	candidates = append(candidates, candidate{"x/crypto", func(p []byte) {
		for n := uint64(0); len(p) > 0; n += uint64(size / 512) {
			one(p[:size], p[:size], 0xfffffff0+n)
			p = p[size:]
		}
	}, 64})

	room, err := unix.Mmap(-1, 0, request, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = unix.Munmap(room) }()
	const repetitions, amount = 15, 64 << 20
	speeds, ratios := map[string][]float64{}, map[string][]float64{}
	for range repetitions {
		var top float64
		for _, c := range candidates {
			n := max(1, amount/request/c.slow)
			c.run(room)
			begin := threadTime()
			for range n {
				c.run(room)
			}
			speed := float64(n*request) / float64(threadTime()-begin)
			if top == 0 {
				top = speed
			}
			speeds[c.name] = append(speeds[c.name], speed)
			ratios[c.name] = append(ratios[c.name], speed/top)
		}
	}
	line := fmt.Sprintf("sector %4d, request %4d KiB, decrypt %-5v", size, request>>10, decrypt)
	for _, c := range candidates {
		line += fmt.Sprintf("  %s %.2f (%.3f)", c.name, median(speeds[c.name]), median(ratios[c.name]))
	}
	fmt.Println(line)
}
