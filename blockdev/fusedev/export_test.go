package fusedev

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"voldek/blockdev/exporttest"
	"voldek/internal/testenv"
)

// breakEnv names one of sins, which the suite must catch.
const breakEnv = "FUSEDEV_TEST_BREAK"

var sins = map[string]func(v *Volume){
	"iv":      func(v *Volume) { v.IVOffset++ },
	"plain":   func(v *Volume) { v.PlainIV = !v.PlainIV },
	"size":    func(v *Volume) { v.Size -= int64(v.SectorSize) },
	"offset":  func(v *Volume) { v.Offset += 512 },
	"key":     func(v *Volume) { v.Key[len(v.Key)-1] ^= 1 },
	"sector":  func(v *Volume) { v.SectorSize = 4096; v.Size &^= 4095 },
	"refusal": func(v *Volume) { v.ReadOnly = !v.ReadOnly },
}

func TestExport(t *testing.T) {
	testenv.Long(t)
	testenv.FUSE(t)
	exporttest.Run(t, func(t *testing.T, c exporttest.Case) exporttest.Export {
		v := Volume{
			Offset: c.Offset, Size: c.Size, SectorSize: c.SectorSize, IVOffset: c.IVOffset, PlainIV: c.PlainIV,
			Key: append([]byte(nil), c.Key...), ReadOnly: c.ReadOnly, Name: "exporttest",
		}
		if sin := sins[os.Getenv(breakEnv)]; sin != nil {
			sin(&v)
		}
		s := serve(t, c.Backing, v)
		return exporttest.Export{Path: s.path(), Close: s.close}
	})
}

// Each way of getting a volume wrong makes the suite fail.
func TestExportCatches(t *testing.T) {
	testenv.Long(t)
	testenv.FUSE(t)
	for sin := range sins {
		t.Run(sin, func(t *testing.T) {
			cmd := exec.Command(os.Args[0], "-test.run=TestExport$/^512-plain-wrap$", "-rapid.nofailfile")
			cmd.Env = append(os.Environ(), breakEnv+"="+sin)
			out, err := cmd.CombinedOutput()
			if err == nil || !strings.Contains(string(out), "--- FAIL: TestExport") {
				t.Errorf("the suite passed, or did not run (%v):\n%s", err, out)
			}
		})
	}
}
