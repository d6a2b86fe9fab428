package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"os/exec"
	"slices"

	"voldek/daemon/api"
)

// attachSeries is the attach of one kind of volume, many times, beside cryptsetup. All times are seconds.
type attachSeries struct {
	Type       string  `json:"type"`
	Voldek     summary `json:"voldek"` // the process voldek attach, from fork to exit
	Steps      []step  `json:"steps"`  // what that time went to; they follow each other
	Daemon     summary `json:"daemon"` // the daemon's own total, all steps but the last
	Cryptsetup summary `json:"cryptsetup"`
	Ratio      float64 `json:"ratio"` // voldek / cryptsetup, median over the repetitions
}

type step struct {
	Name string `json:"name"`
	summary
}

// sample is one repetition.
type sample struct {
	voldek, cryptsetup float64
	steps              api.Steps
}

// stepsOf cuts a sample into steps that follow each other and add up to the whole.
var stepsOf = []struct {
	name string
	of   func(sample) float64
}{
	{"header", func(s sample) float64 { return s.steps.Header }},
	{"fetch", func(s sample) float64 { return s.steps.Fetch }},
	{"key slot", func(s sample) float64 { return s.steps.Keyslot }},
	{"export", func(s sample) float64 { return s.steps.Export }},
	{"journal", func(s sample) float64 {
		return s.steps.Total - s.steps.Header - s.steps.Fetch - s.steps.Keyslot - s.steps.Export
	}},
	{"command and socket", func(s sample) float64 { return s.voldek - s.steps.Total }},
}

// measureAttach repeats voldek attach and cryptsetup's test of the same key on the same volume, first the one, then the other.
func (b *room) measureAttach(ctx context.Context, kind string, repetitions int) (*attachSeries, error) {
	volume, err := b.format(ctx, kind, kind, 64<<20)
	if err != nil {
		return nil, err
	}
	d, err := b.startDaemon()
	if err != nil {
		return nil, err
	}
	defer d.stop()
	defer progress("")
	if _, err := d.repetition(ctx, volume, false); err != nil { // brings the programs into memory; not counted
		return nil, err
	}
	var samples []sample
	for i := range repetitions {
		progress("attach %s %d/%d", kind, i+1, repetitions)
		s, err := d.repetition(ctx, volume, i%2 == 1)
		if err != nil {
			return nil, err
		}
		samples = append(samples, s)
	}
	return newSeries(kind, samples), nil
}

func (d *daemon) repetition(ctx context.Context, volume string, cryptsetupFirst bool) (sample, error) {
	var s sample
	actions := []func() error{
		func() error { return d.attachOnce(ctx, volume, &s) },
		func() (err error) {
			s.cryptsetup, err = timed(exec.CommandContext(ctx, "cryptsetup", "open", "--test-passphrase", "--key-file", d.room.key, volume))
			return err
		},
	}
	if cryptsetupFirst {
		slices.Reverse(actions)
	}
	for _, act := range actions {
		if err := act(); err != nil {
			return s, err
		}
	}
	return s, nil
}

func (d *daemon) attachOnce(ctx context.Context, volume string, s *sample) error {
	var err error
	if s.voldek, err = timed(d.attach(ctx, volume, "bench", "fuse")); err != nil {
		return err
	}
	v, err := d.volume(ctx, "bench")
	if err != nil {
		return err
	}
	s.steps = *v.Steps
	_, err = timed(d.voldek(ctx, "detach", "bench"))
	return err
}

// volume asks the daemon about a volume.
func (d *daemon) volume(ctx context.Context, name string) (*api.Volume, error) {
	out, err := d.voldek(ctx, "status", name, "--json").Output()
	if err != nil {
		return nil, fmt.Errorf("voldek status %s: %w", name, err)
	}
	var answer api.Answer
	if err := json.Unmarshal(out, &answer); err != nil {
		return nil, fmt.Errorf("voldek status %s: %w", name, err)
	}
	if answer.Volume == nil || answer.Volume.Steps == nil {
		return nil, fmt.Errorf("voldek status %s: not attached", name)
	}
	return answer.Volume, nil
}

func newSeries(kind string, samples []sample) *attachSeries {
	over := func(of func(sample) float64) summary {
		var values []float64
		for _, s := range samples {
			values = append(values, of(s))
		}
		return summarize(values)
	}
	series := &attachSeries{
		Type:       kind,
		Voldek:     over(func(s sample) float64 { return s.voldek }),
		Daemon:     over(func(s sample) float64 { return s.steps.Total }),
		Cryptsetup: over(func(s sample) float64 { return s.cryptsetup }),
		Ratio:      over(func(s sample) float64 { return s.voldek / s.cryptsetup }).Median,
	}
	for _, part := range stepsOf {
		series.Steps = append(series.Steps, step{part.name, over(part.of)})
	}
	return series
}

// summary tells of many measurements of one thing.
type summary struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	P90    float64 `json:"p90"`
}

// summarize keeps microseconds: beyond them is noise.
func summarize(values []float64) summary {
	at := func(p float64) float64 { return math.Round(percentile(values, p)*1e6) / 1e6 }
	return summary{Median: at(50), Min: at(0), P90: at(90)}
}

// percentile interpolates between the two nearest of the sorted values, of which there must be one.
func percentile(values []float64, p float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	at := p / 100 * float64(len(sorted)-1)
	below := int(at)
	above := min(below+1, len(sorted)-1)
	return sorted[below] + (at-float64(below))*(sorted[above]-sorted[below])
}
