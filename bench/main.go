// Command bench measures voldek beside its peers, all in one run on one machine, and writes figures, a table and a picture.
// It knows voldek only from outside: the binaries in bin/, as processes.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"time"

	"voldek/internal/cli"
)

func main() {
	out := flag.String("o", "bench/results", "directory for attach.json, attach.txt and attach.svg")
	repetitions := flag.Int("n", 30, "repetitions of each attach")
	flag.Parse()
	ctx, stop := cli.Signals()
	err := run(ctx, *out, *repetitions)
	if ctx.Err() != nil {
		err = errors.New("interrupted; nothing was written")
	}
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench: error:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, out string, repetitions int) error {
	if repetitions < 1 {
		return fmt.Errorf("-n %d: want at least one repetition", repetitions)
	}
	if err := os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin"); err != nil {
		return err
	}
	b, err := newRoom()
	if err != nil {
		return err
	}
	defer b.remove()
	r := &results{Version: 1, Benchmark: "attach", Date: time.Now().UTC().Truncate(time.Second), Repetitions: repetitions}
	if r.Weather, err = readWeather(ctx, b); err != nil {
		return err
	}
	for _, kind := range []string{"luks2", "luks1"} {
		series, err := b.measureAttach(ctx, kind, repetitions)
		if err != nil {
			return fmt.Errorf("attach %s: %w", kind, err)
		}
		r.Attach = append(r.Attach, series)
	}
	if r.Memory, err = b.measureMemory(ctx); err != nil {
		return fmt.Errorf("memory: %w", err)
	}
	r.Goals = goals(r)
	if err := r.printText(os.Stdout); err != nil {
		return err
	}
	return r.save(out)
}
