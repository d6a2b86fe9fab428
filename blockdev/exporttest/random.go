package exporttest

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// testRandom runs random operations, of all kinds an export has, against the model. Several sequences go over the same
// export: each begins with what the one before left.
func testRandom(t *testing.T, r *run) {
	buffer := aligned(t, 1<<18)
	rapid.Check(t, func(rt *rapid.T) {
		m := &machine{run: r, buffer: buffer}
		m.reopen(rt)
		defer m.close()
		rt.Repeat(map[string]func(*rapid.T){
			"write":       m.writeAny,
			"read":        m.readAny,
			"writeDirect": m.writeDirect,
			"readDirect":  m.readDirect,
			"mmap":        m.mmapWrite,
			"sync":        m.sync,
			"reopen":      m.reopen,
		})
		whole := make([]byte, r.Size)
		r.read(rt, m.plain, whole, 0)
	})
}

// machine is the state of one sequence: a file open in each way.
type machine struct {
	*run
	buffer        []byte
	plain, direct *os.File
	seed          uint64
}

func (m *machine) close() {
	for _, f := range []*os.File{m.plain, m.direct} {
		if f != nil {
			_ = f.Close()
		}
	}
}

func (m *machine) reopen(t *rapid.T) {
	m.close()
	var err error
	if m.plain, err = os.OpenFile(m.Path, os.O_RDWR, 0); err == nil {
		m.direct, err = os.OpenFile(m.Path, os.O_RDWR|unix.O_DIRECT, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// anyRange draws a range inside the volume, of up to 64 KiB and mostly small.
func (m *machine) anyRange(t *rapid.T) (off int64, n int) {
	off = rapid.Int64Range(0, m.Size-1).Draw(t, "off")
	most := []int64{600, 5000, 1 << 16}[rapid.IntRange(0, 2).Draw(t, "magnitude")]
	return off, int(rapid.Int64Range(1, min(most, m.Size-off)).Draw(t, "n"))
}

// anySectors draws a range of whole sectors, of up to 256 KiB.
func (m *machine) anySectors(t *rapid.T) (off int64, p []byte) {
	all := int(m.Size) / m.SectorSize
	first := rapid.IntRange(0, all-1).Draw(t, "sector")
	n := rapid.IntRange(1, min(all-first, len(m.buffer)/m.SectorSize)).Draw(t, "sectors")
	return int64(first * m.SectorSize), m.buffer[:n*m.SectorSize]
}

func (m *machine) next(n int) []byte {
	m.seed++
	return pattern(m.seed, n)
}

func (m *machine) writeAny(t *rapid.T) {
	off, n := m.anyRange(t)
	m.write(t, m.plain, m.next(n), off)
}

func (m *machine) readAny(t *rapid.T) {
	off, n := m.anyRange(t)
	m.read(t, m.plain, make([]byte, n), off)
}

func (m *machine) writeDirect(t *rapid.T) {
	off, p := m.anySectors(t)
	copy(p, m.next(len(p)))
	m.write(t, m.direct, p, off)
}

func (m *machine) readDirect(t *rapid.T) {
	off, p := m.anySectors(t)
	m.read(t, m.direct, p, off)
}

func (m *machine) mmapWrite(t *rapid.T) {
	off, n := m.anyRange(t)
	begin := off &^ 4095
	p, err := unix.Mmap(int(m.plain.Fd()), begin, int(off-begin)+n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	m.check(t, p, begin)
	data := m.next(n)
	copy(p[off-begin:], data)
	copy(m.model[off:], data)
	if rapid.Bool().Draw(t, "msync") {
		err = unix.Msync(p, unix.MS_SYNC)
	}
	if err2 := unix.Munmap(p); err != nil || err2 != nil {
		t.Fatal(err, err2)
	}
}

func (m *machine) sync(t *rapid.T) {
	if err := m.plain.Sync(); err != nil {
		t.Fatal(err)
	}
}
