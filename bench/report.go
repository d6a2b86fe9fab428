package main

import (
	"bytes"
	"context"
	"debug/buildinfo"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"voldek/internal/cli"
)

// results is attach.json. Times are seconds, sizes bytes.
type results struct {
	Version     int             `json:"version"`
	Benchmark   string          `json:"benchmark"`
	Date        time.Time       `json:"date"`
	Weather     weather         `json:"weather"`
	Repetitions int             `json:"repetitions"`
	Attach      []*attachSeries `json:"attach"`
	Memory      *memory         `json:"memory"`
	Goals       []goal          `json:"goals"`
}

// weather is what the figures depend on.
type weather struct {
	CPU        string `json:"cpu"`
	Cores      int    `json:"cores"`
	Kernel     string `json:"kernel"`
	Go         string `json:"go"`
	Commit     string `json:"commit"`
	Cryptsetup string `json:"cryptsetup"`
	Filesystem string `json:"filesystem"`
	Load       string `json:"load"` // of the last minute, before the run
}

func readWeather(ctx context.Context, b *room) (weather, error) {
	w := weather{CPU: "unknown CPU", Cores: runtime.NumCPU(), Filesystem: b.filesystem()}
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return w, err
	}
	for line := range strings.Lines(string(info)) {
		if name, value, _ := strings.Cut(line, ":"); strings.TrimSpace(name) == "model name" {
			w.CPU = strings.TrimSpace(value)
			break
		}
	}
	var system unix.Utsname
	load, errLoad := os.ReadFile("/proc/loadavg")
	built, errBuilt := buildinfo.ReadFile(b.voldekd)
	if err := errors.Join(unix.Uname(&system), errLoad, errBuilt); err != nil {
		return w, err
	}
	w.Kernel = unix.ByteSliceToString(system.Release[:])
	w.Load = strings.Fields(string(load))[0]
	w.Go = built.GoVersion
	if w.Commit, err = lastWord(exec.CommandContext(ctx, b.voldek, "--version"), 2); err != nil {
		return w, err
	}
	w.Cryptsetup, err = lastWord(exec.CommandContext(ctx, "cryptsetup", "--version"), 1)
	return w, err
}

// lastWord runs a program that tells its version and returns that word of its answer.
func lastWord(cmd *exec.Cmd, at int) (string, error) {
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w", strings.Join(cmd.Args, " "), err)
	}
	words := strings.Fields(string(out))
	if len(words) <= at {
		return "", fmt.Errorf("%s answers %q", strings.Join(cmd.Args, " "), out)
	}
	return words[at], nil
}

// machine and programs are the weather in two halves, each short enough for a line of the picture.
func (w weather) machine() string {
	return fmt.Sprintf("%s, %d cores, Linux %s, volumes on %s, load %s before", w.CPU, w.Cores, w.Kernel, w.Filesystem, w.Load)
}

func (r *results) programs() string {
	return fmt.Sprintf("voldek %s, %s, cryptsetup %s, %s", r.Weather.Commit, r.Weather.Go, r.Weather.Cryptsetup, r.Date.Format(time.RFC3339))
}

// goal is a promise, and what came of it in this run.
type goal struct {
	Name   string `json:"name"`
	Figure string `json:"figure"`
	Result string `json:"result"` // met, not met, not measured
}

const (
	maxAttach    = 0.050    // seconds
	maxIdle      = 30 << 20 // bytes
	maxPerFUSE   = 8 << 20
	maxPerKernel = 256 << 10 // "nothing": what the heap's own swing allows to see
)

func goals(r *results) []goal {
	var all []goal
	check := func(met bool, name, figure string) {
		result := "not met"
		if met {
			result = "met"
		}
		all = append(all, goal{name, figure, result})
	}
	for _, s := range r.Attach {
		check(s.Voldek.Median < maxAttach, "attach "+s.Type+" under 50 ms", ms(s.Voldek.Median)+" ms")
		check(s.Ratio <= 1, "attach "+s.Type+" not slower than cryptsetup", fmt.Sprintf("%.2f of its time", s.Ratio))
	}
	check(r.Memory.Idle <= maxIdle, "voldekd idle at most 30 MiB", cli.Size(r.Memory.Idle))
	worst := worstPerVolume(r.Memory.FUSE)
	check(worst <= maxPerFUSE, "at most 8 MiB more per FUSE volume under load", cli.Size(worst))
	const nothing = "nothing more per dm volume"
	if len(r.Memory.Kernel) == 0 {
		return append(all, goal{nothing, "not measured here: no device-mapper", "not measured"})
	}
	// The first volume pays for what all share, so only what the others add counts.
	first, last := r.Memory.Kernel[0], r.Memory.Kernel[len(r.Memory.Kernel)-1]
	more := ((last.Peak - last.Idle) - (first.Peak - first.Idle)) / int64(last.Volumes-first.Volumes)
	check(more <= maxPerKernel, nothing, fmt.Sprintf("%.2f MiB", mib(more)))
	return all
}

func worstPerVolume(loads []volumesLoad) (worst int64) {
	for _, l := range loads {
		worst = max(worst, l.PerVolume)
	}
	return worst
}

func ms(seconds float64) string  { return fmt.Sprintf("%.1f", seconds*1e3) }
func mib(bytes int64) float64    { return float64(bytes) / (1 << 20) }
func mibText(bytes int64) string { return fmt.Sprintf("%.1f", mib(bytes)) }

// printText writes the tables: the weather, attach, memory, goals.
func (r *results) printText(w io.Writer) error {
	fmt.Fprintf(w, "%s; %s\n\n", r.Weather.machine(), r.programs())
	fmt.Fprintf(w, "Attach in ms, %d repetitions in turns (the indented steps are parts of voldek's time):\n", r.Repetitions)
	var rows [][]string
	row := func(s *attachSeries, what string, v summary) {
		rows = append(rows, []string{s.Type, what, ms(v.Median), ms(v.Min), ms(v.P90)})
	}
	for _, s := range r.Attach {
		row(s, "voldek attach --via fuse", s.Voldek)
		for _, part := range s.Steps {
			row(s, "  "+part.Name, part.summary)
		}
		row(s, "  all in the daemon", s.Daemon)
		row(s, "cryptsetup open --test-passphrase", s.Cryptsetup)
		rows = append(rows, []string{s.Type, "voldek / cryptsetup", fmt.Sprintf("%.2f", s.Ratio), "", ""})
	}
	err := cli.PrintTable(w, []string{"TYPE", "WHAT", "MEDIAN", "MIN", "P90"}, rows)

	fmt.Fprintf(w, "\nMemory of voldekd in MiB, resident; idle %s:\n", mibText(r.Memory.Idle))
	rows = nil
	for i, l := range slices.Concat(r.Memory.FUSE, r.Memory.Kernel) {
		via := "fuse"
		if i >= len(r.Memory.FUSE) {
			via = "kernel"
		}
		rows = append(rows, []string{via, fmt.Sprint(l.Volumes), mibText(l.Idle), mibText(l.Peak), mibText(l.PerVolume)})
	}
	err = errors.Join(err, cli.PrintTable(w, []string{"VIA", "VOLUMES", "IDLE", "PEAK", "MORE PER VOLUME"}, rows))

	fmt.Fprintf(w, "\nGoals:\n")
	rows = nil
	for _, g := range r.Goals {
		rows = append(rows, []string{g.Name, g.Figure, g.Result})
	}
	return errors.Join(err, cli.PrintTable(w, []string{"GOAL", "FIGURE", "RESULT"}, rows))
}

// save writes attach.json, attach.txt and attach.svg, each whole or not at all.
func (r *results) save(dir string) error {
	var asJSON, asText bytes.Buffer
	if err := errors.Join(cli.PrintJSON(&asJSON, r), r.printText(&asText), os.MkdirAll(dir, 0o755)); err != nil {
		return err
	}
	for name, content := range map[string][]byte{
		"attach.json": asJSON.Bytes(), "attach.txt": asText.Bytes(), "attach.svg": []byte(plot(r)),
	} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path+".tmp", content, 0o644); err != nil {
			return err
		}
		if err := os.Rename(path+".tmp", path); err != nil {
			return err
		}
	}
	return nil
}
