//go:build !((amd64 || arm64) && !purego)

package xts

var tiers = []tier{generic}

func crypt(_ tier, k *schedules, dst, src []byte, sector uint64, sectorSize int, decrypt bool) {
	cryptGeneric(k, dst, src, sector, sectorSize, decrypt)
}

func (k *schedules) expandAsm(_, _ []byte) { panic("xts: no assembly here") }
