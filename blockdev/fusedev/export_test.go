package fusedev

import (
	"testing"

	"voldek/blockdev/exporttest"
	"voldek/internal/testenv"
)

func TestExport(t *testing.T) {
	testenv.Long(t)
	testenv.FUSE(t)
	exporttest.Run(t, func(t *testing.T, c exporttest.Case) exporttest.Export {
		s := serve(t, c.Backing, Volume{
			Offset: c.Offset, Size: c.Size, SectorSize: c.SectorSize, IVOffset: c.IVOffset, PlainIV: c.PlainIV,
			Key: c.Key, ReadOnly: c.ReadOnly, Name: "exporttest",
		})
		return exporttest.Export{Path: s.path(), Close: s.close}
	})
}
