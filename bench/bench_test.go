package main

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"voldek/daemon/api"
)

func TestPercentile(t *testing.T) {
	for _, c := range []struct {
		values []float64
		p      float64
		want   float64
	}{
		{[]float64{7}, 0, 7},
		{[]float64{7}, 50, 7},
		{[]float64{7}, 90, 7},
		{[]float64{3, 1, 2}, 50, 2},
		{[]float64{4, 1, 3, 2}, 50, 2.5},
		{[]float64{4, 1, 3, 2}, 0, 1},
		{[]float64{4, 1, 3, 2}, 100, 4},
		{[]float64{11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1}, 90, 10},
		{[]float64{0, 10}, 90, 9},
	} {
		before := append([]float64(nil), c.values...)
		if got := percentile(c.values, c.p); math.Abs(got-c.want) > 1e-12 {
			t.Errorf("percentile(%v, %v) = %v, want %v", before, c.p, got, c.want)
		}
		for i := range before {
			if before[i] != c.values[i] {
				t.Fatalf("the order of %v was changed to %v", before, c.values)
			}
		}
	}
}

// The ratio is the median of ratios, not the ratio of medians, and the steps of a repetition add up to its whole.
func TestSeries(t *testing.T) {
	steps := api.Steps{Header: 0.001, Fetch: 0.002, Keyslot: 0.003, Export: 0.004, Total: 0.011}
	s := newSeries("luks2", []sample{
		{voldek: 0.020, cryptsetup: 0.010, steps: steps},
		{voldek: 0.020, cryptsetup: 0.040, steps: steps},
		{voldek: 0.020, cryptsetup: 0.080, steps: steps},
	})
	if s.Ratio != 0.5 || s.Voldek.Median != 0.020 || s.Cryptsetup.Median != 0.040 || s.Daemon.P90 != 0.011 {
		t.Errorf("%+v", s)
	}
	if sum := sumOfSteps(s); math.Abs(sum-0.020) > 1e-9 {
		t.Errorf("the steps add up to %v", sum)
	}
}

// example is a run with a slow attach and a device-mapper.
func example() *results {
	steps := api.Steps{Header: 0.0004, Fetch: 0.0001, Keyslot: 0.0025, Export: 0.001, Total: 0.0043}
	series := func(kind string, whole float64) *attachSeries {
		return newSeries(kind, []sample{{voldek: whole, cryptsetup: 0.012, steps: steps}})
	}
	r := &results{
		Version: 1, Benchmark: "attach", Date: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), Repetitions: 1,
		Weather: weather{CPU: `CPU "A & B" <x>`, Cores: 2, Kernel: "6.1", Go: "go1.26", Commit: "abc", Cryptsetup: "2.6.1", Filesystem: "tmpfs", Load: "0.1"},
		Attach:  []*attachSeries{series("luks2", 0.010), series("luks1", 0.080)},
		Memory: &memory{
			Idle:   9 << 20,
			FUSE:   []volumesLoad{{1, 9 << 20, 15 << 20, 6 << 20}, {2, 9 << 20, 27 << 20, 9 << 20}},
			Kernel: []volumesLoad{{1, 9 << 20, 12 << 20, 3 << 20}, {4, 9 << 20, 12 << 20, 3 << 18}},
		},
	}
	r.Goals = goals(r)
	return r
}

func TestGoals(t *testing.T) {
	want := []string{"met", "met", "not met", "not met", "met", "not met", "met"}
	for i, g := range example().Goals {
		if g.Result != want[i] {
			t.Errorf("%s: %s (%s), want %s", g.Name, g.Result, g.Figure, want[i])
		}
	}
	r := example()
	r.Memory.Kernel = nil
	g := goals(r)
	if last := g[len(g)-1]; last.Result != "not measured" || last.Figure != "not measured here: no device-mapper" {
		t.Errorf("without a device-mapper: %+v", last)
	}
}

func TestSaveWritesAllThreeAndTheTableIsAscii(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new")
	if err := example().save(dir); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 3 {
		t.Fatalf("%v, %v", entries, err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "attach.json"))
	if err != nil {
		t.Fatal(err)
	}
	var back results
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&back); err != nil {
		t.Fatal(err)
	}
	if back.Version != 1 || len(back.Attach[0].Steps) != len(stepsOf) || back.Attach[0].Steps[2].Median != 0.0025 {
		t.Errorf("read back as %+v", back)
	}
	table, err := os.ReadFile(filepath.Join(dir, "attach.txt"))
	if err != nil {
		t.Fatal(err)
	}
	if i := strings.IndexFunc(string(table), func(r rune) bool { return r > 0x7e }); i >= 0 {
		t.Errorf("columns are counted in bytes, but there is %q", table[i:i+4])
	}
}

// The picture is well-formed, no bar or text begins outside, and bars of one row follow each other without a gap.
func TestPlot(t *testing.T) {
	bars, err := checkPicture(plot(example()))
	if err != nil {
		t.Fatal(err)
	}
	if want := 2*(len(stepsOf)+1) + len(stepsOf) + 1 + 1; bars != want {
		t.Errorf("%d rectangles, want %d: the bars, the legend and the background", bars, want)
	}
	if !strings.Contains(plot(example()), "goal: under 50 ms") {
		t.Error("the goal is not drawn")
	}
}

func TestABadPictureIsFound(t *testing.T) {
	good := plot(example())
	for name, bad := range map[string]string{
		"not closed":  strings.TrimSuffix(good, "</svg>\n"),
		"unescaped":   strings.Replace(good, "&amp;", "&", 1),
		"outside":     strings.Replace(good, `x="190.00"`, `x="900.00"`, 1),
		"not a width": strings.Replace(good, `height="26"`, `height="NaN"`, 1),
		"cut off":     strings.Replace(good, `x="274.4"`, `x="850.0"`, 1),
		"gap":         strings.Replace(good, `x="190.00"`, `x="191.00"`, 1),
	} {
		if _, err := checkPicture(bad); err == nil || bad == good {
			t.Errorf("%s: not found", name)
		}
	}
}

// checkPicture counts the rectangles.
func checkPicture(svg string) (bars int, err error) {
	ends := map[string]float64{} // of the last bar, by row
	for decoder := xml.NewDecoder(strings.NewReader(svg)); ; {
		token, err := decoder.Token()
		if errors.Is(err, io.EOF) {
			return bars, nil
		}
		if err != nil {
			return bars, err
		}
		element, ok := token.(xml.StartElement)
		if !ok || element.Name.Local != "rect" && element.Name.Local != "text" {
			continue
		}
		at := map[string]string{}
		for _, a := range element.Attr {
			at[a.Name.Local] = a.Value
		}
		x, _ := strconv.ParseFloat(at["x"], 64)
		if x < 0 || x > plotWidth {
			return bars, errors.New("outside: x=" + at["x"])
		}
		if element.Name.Local == "text" {
			text, err := decoder.Token()
			if err != nil {
				return bars, err
			}
			words, _ := text.(xml.CharData)
			if at["class"] == "" && at["text-anchor"] == "start" && x+textWidth(string(words)) > plotWidth {
				return bars, errors.New("cut off: " + string(words))
			}
			continue
		}
		bars++
		width, err := strconv.ParseFloat(at["width"], 64)
		height, errHeight := strconv.ParseFloat(at["height"], 64)
		if err != nil || errHeight != nil || !(width >= 0 && height > 0) || x+width > plotWidth {
			return bars, errors.New("bad rectangle: " + at["width"] + " by " + at["height"])
		}
		if strings.HasPrefix(at["class"], "s") && at["height"] == strconv.Itoa(barHeight) {
			if end, found := ends[at["y"]]; found && math.Abs(end-x) > 0.05 || !found && x != plotLeft {
				return bars, errors.New("a gap at x=" + at["x"])
			}
			ends[at["y"]] = x + width
		}
	}
}
