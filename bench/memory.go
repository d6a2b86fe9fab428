package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"time"
)

// maxVolumes is up to how many volumes are put under load at once.
const maxVolumes = 4

// memory is what voldekd holds resident, in bytes.
type memory struct {
	Idle   int64         `json:"idle"`   // after its start, the median over the daemons of this run
	FUSE   []volumesLoad `json:"fuse"`   // one entry per number of volumes
	Kernel []volumesLoad `json:"kernel"` // empty where the host has no device-mapper
}

// volumesLoad is one daemon with a number of volumes under load.
type volumesLoad struct {
	Volumes   int   `json:"volumes"`
	Idle      int64 `json:"idle"`
	Peak      int64 `json:"peak"`       // the kernel's high-water mark, the attach included
	PerVolume int64 `json:"per_volume"` // (peak - idle) / volumes
}

// loads are fio's options for what is run on all volumes at once, one load after the other.
var loads = [][]string{
	{"--rw=rw", "--bs=1M", "--iodepth=8"},
	{"--rw=randrw", "--bs=1M", "--iodepth=8"},
	{"--rw=randrw", "--bs=4k", "--iodepth=32"},
}

func (b *room) measureMemory(ctx context.Context) (*memory, error) {
	var volumes []string
	for i := range maxVolumes {
		volume, err := b.format(ctx, fmt.Sprintf("load%d", i), "luks2", 128<<20)
		if err != nil {
			return nil, err
		}
		volumes = append(volumes, volume)
	}
	m := &memory{}
	var err error
	if m.FUSE, err = b.loadSeries(ctx, volumes, "fuse"); err != nil {
		return nil, err
	}
	if haveDeviceMapper() {
		if m.Kernel, err = b.loadSeries(ctx, volumes, "kernel"); err != nil {
			return nil, err
		}
	}
	var idle []float64
	for _, l := range slices.Concat(m.FUSE, m.Kernel) {
		idle = append(idle, float64(l.Idle))
	}
	m.Idle = int64(percentile(idle, 50))
	return m, nil
}

// haveDeviceMapper opens the node, which is also there on hosts whose kernel has no device-mapper.
func haveDeviceMapper() bool {
	f, err := os.OpenFile("/dev/mapper/control", os.O_RDWR, 0)
	if err != nil {
		return false
	}
	_ = f.Close()
	return true
}

// loadSeries loads one volume, two volumes and so on, with a fresh daemon for each number.
func (b *room) loadSeries(ctx context.Context, volumes []string, via string) ([]volumesLoad, error) {
	defer progress("")
	var series []volumesLoad
	for n := 1; n <= len(volumes); n++ {
		progress("memory, via %s: %d of %d volumes", via, n, len(volumes))
		load, err := b.loadOnce(ctx, volumes[:n], via)
		if err != nil {
			return nil, fmt.Errorf("%d volumes via %s: %w", n, via, err)
		}
		series = append(series, load)
	}
	return series, nil
}

func (b *room) loadOnce(ctx context.Context, volumes []string, via string) (load volumesLoad, err error) {
	d, err := b.startDaemon()
	if err != nil {
		return load, err
	}
	defer d.stop()
	load.Volumes = len(volumes)
	if load.Idle, err = d.settledRSS(ctx); err != nil {
		return load, err
	}
	for i, volume := range volumes {
		name := fmt.Sprintf("bench%d", i)
		if _, err := timed(d.attach(ctx, volume, name, via)); err != nil {
			return load, err
		}
		defer func() {
			_, detached := timed(d.voldek(context.WithoutCancel(ctx), "detach", name))
			err = errors.Join(err, detached)
		}()
	}
	if err := d.runLoads(ctx, len(volumes)); err != nil {
		return load, err
	}
	load.Peak, err = d.status("VmHWM")
	load.PerVolume = (load.Peak - load.Idle) / int64(load.Volumes)
	return load, err
}

// runLoads lets fio work on all volumes in parallel, past the page cache.
func (d *daemon) runLoads(ctx context.Context, volumes int) error {
	for _, options := range loads {
		args := append([]string{"--ioengine=libaio", "--direct=1", "--time_based", "--runtime=3", "--allow_file_create=0",
			"--norandommap", "--randrepeat=0"}, options...)
		for i := range volumes {
			name := fmt.Sprintf("bench%d", i)
			v, err := d.volume(ctx, name)
			if err != nil {
				return err
			}
			args = append(args, "--name="+name, "--filename="+v.Export)
		}
		cmd := exec.CommandContext(ctx, "fio", args...)
		cmd.Dir = d.room.dir
		if _, err := timed(cmd); err != nil {
			return err
		}
	}
	return nil
}

// settledRSS waits until the resident size has not changed for half a second: the runtime is done with its start.
func (d *daemon) settledRSS(ctx context.Context) (int64, error) {
	const pause, calm = 50 * time.Millisecond, 10
	var last int64
	for same, deadline := 0, time.Now().Add(30*time.Second); same < calm; time.Sleep(pause) {
		now, err := d.status("VmRSS")
		if err != nil {
			return 0, err
		}
		if ctx.Err() != nil {
			return 0, ctx.Err()
		}
		if time.Now().After(deadline) {
			return 0, fmt.Errorf("the resident size of voldekd does not settle: %d, %d", last, now)
		}
		if same++; now != last {
			same, last = 0, now
		}
	}
	return last, nil
}

// status reads a size from the kernel's account of the daemon, in bytes.
func (d *daemon) status(field string) (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(text) {
		words := bytes.Fields(line)
		if len(words) == 3 && string(words[0]) == field+":" {
			kib, err := strconv.ParseInt(string(words[1]), 10, 64)
			return kib << 10, err
		}
	}
	return 0, fmt.Errorf("/proc/%d/status: no %s", d.cmd.Process.Pid, field)
}
