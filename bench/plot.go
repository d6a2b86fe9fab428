package main

import (
	"fmt"
	"html"
	"strings"
)

// The canvas, in SVG's user units.
const (
	plotWidth  = 880
	plotLeft   = 190 // of the time axis
	plotRight  = 850
	plotTop    = 76
	barHeight  = 26
	barPitch   = 34
	groupPitch = 2*barPitch + 26
)

// style has a class per step (s0, s1, …), in the order of stepsOf, and one for the peer.
const style = `
  text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; font-size: 13px; fill: #24292f;
    stroke: #ffffff; stroke-width: 4px; stroke-linejoin: round; paint-order: stroke }
  .title { font-size: 17px; font-weight: 600 }
  .small { font-size: 11px; fill: #57606a }
  .back { fill: #ffffff }
  .grid { stroke: #d8dee4; stroke-width: 1 }
  .goal { stroke: #cf222e; stroke-width: 2; stroke-dasharray: 6 4 }
  .goaltext { fill: #cf222e }
  .s0 { fill: #0969da } .s1 { fill: #1b9e9e } .s2 { fill: #e08a00 }
  .s3 { fill: #2da44e } .s4 { fill: #a24bb5 } .s5 { fill: #79b8ff } .peer { fill: #8c959f }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; stroke: #0d1117 } .small { fill: #9198a1 } .back { fill: #0d1117 } .grid { stroke: #30363d }
    .goal { stroke: #ff7b72 } .goaltext { fill: #ff7b72 } .peer { fill: #6e7681 }
  }
`

// plot draws, for each kind of volume, voldek's steps one behind the other above cryptsetup's bar, on one time axis.
func plot(r *results) string {
	longest := maxAttach
	for _, s := range r.Attach {
		longest = max(longest, s.Voldek.Median, s.Cryptsetup.Median, sumOfSteps(s))
	}
	bottom := plotTop + len(r.Attach)*groupPitch
	height := bottom + 116
	p := &picture{scale: (plotRight - plotLeft) / (longest * 1.08)}
	fmt.Fprintf(&p.out, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img">`+"\n",
		plotWidth, height, plotWidth, height)
	fmt.Fprintf(&p.out, "<title>Attach: voldek beside cryptsetup</title>\n<style>%s</style>\n", style)
	fmt.Fprintf(&p.out, `<rect class="back" width="%d" height="%d"/>`+"\n", plotWidth, height)
	p.text(24, 32, "title", "start", "voldek attach --via fuse, beside cryptsetup open --test-passphrase")
	p.text(24, 52, "small", "start", fmt.Sprintf("whole processes, from fork to exit; medians of %d repetitions in turns; one pbkdf2 key slot of 1000 iterations", r.Repetitions))
	p.axis(longest, bottom)
	for i, s := range r.Attach {
		p.group(plotTop+i*groupPitch, s)
	}
	p.legend(bottom + 44)
	p.text(24, height-30, "small", "start", r.Weather.machine())
	p.text(24, height-14, "small", "start", r.programs())
	p.out.WriteString("</svg>\n")
	return p.out.String()
}

type picture struct {
	out   strings.Builder
	scale float64 // units per second
}

func (p *picture) x(seconds float64) float64 { return plotLeft + seconds*p.scale }

func (p *picture) text(x float64, y int, class, anchor, text string) {
	fmt.Fprintf(&p.out, `<text x="%.1f" y="%d" class="%s" text-anchor="%s">%s</text>`+"\n", x, y, class, anchor, html.EscapeString(text))
}

func (p *picture) line(x float64, y1, y2 int, class string) {
	fmt.Fprintf(&p.out, `<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" class="%s"/>`+"\n", x, y1, x, y2, class)
}

// bar draws from start for a duration; a pointer resting on it shows its name and time.
func (p *picture) bar(start, seconds float64, y int, class, name string) {
	fmt.Fprintf(&p.out, `<rect x="%.2f" y="%d" width="%.2f" height="%d" class="%s"><title>%s: %s ms</title></rect>`+"\n",
		p.x(start), y, max(seconds, 0)*p.scale, barHeight, class, html.EscapeString(name), ms(seconds))
}

// axis draws a line every so many milliseconds that there are at most ten, and the goal.
func (p *picture) axis(longest float64, bottom int) {
	pitch := 0.010
	for longest/pitch > 10 {
		pitch *= 2
	}
	for i := 0; float64(i)*pitch <= longest*1.08; i++ {
		at := float64(i) * pitch
		p.line(p.x(at), plotTop-6, bottom-8, "grid")
		p.text(p.x(at), bottom+8, "small", "middle", fmt.Sprintf("%.0f ms", at*1e3))
	}
	p.line(p.x(maxAttach), plotTop-6, bottom-8, "goal")
	p.text(p.x(maxAttach)-6, bottom-16, "goaltext", "end", "goal: under 50 ms")
}

// group draws the two bars of one kind of volume.
func (p *picture) group(y int, s *attachSeries) {
	const baseline = 18
	kind := strings.ToUpper(s.Type)
	p.text(plotLeft-10, y+baseline, "", "end", kind+", voldek")
	start := 0.0
	for i, part := range s.Steps {
		p.bar(start, part.Median, y, fmt.Sprintf("s%d", i), part.Name)
		start += max(part.Median, 0)
	}
	p.figure(max(start, s.Voldek.Median), y+baseline, fmt.Sprintf("%s ms, %.2f of cryptsetup's time", ms(s.Voldek.Median), s.Ratio))
	y += barPitch
	p.text(plotLeft-10, y+baseline, "", "end", kind+", cryptsetup")
	p.bar(0, s.Cryptsetup.Median, y, "peer", "cryptsetup")
	p.figure(s.Cryptsetup.Median, y+baseline, ms(s.Cryptsetup.Median)+" ms")
}

// figure writes behind the end of a bar, or onto the bar where there is no room behind it.
func (p *picture) figure(end float64, y int, text string) {
	if p.x(end)+8+textWidth(text) <= plotWidth {
		p.text(p.x(end)+8, y, "", "start", text)
	} else {
		p.text(p.x(end)-8, y, "", "end", text)
	}
}

// textWidth is an estimate: the reader's font is not known here.
func textWidth(text string) float64 { return 7.6 * float64(len(text)) }

// legend names the colours.
func (p *picture) legend(y int) {
	x := 24.0
	name := func(class, text string) {
		p.swatch(x, y, class, text)
		x += 50 + textWidth(text)
	}
	for i, part := range stepsOf {
		name(fmt.Sprintf("s%d", i), part.name)
	}
	name("peer", "cryptsetup")
}

func (p *picture) swatch(x float64, y int, class, name string) {
	fmt.Fprintf(&p.out, `<rect x="%.1f" y="%d" width="14" height="14" rx="2" class="%s"/>`+"\n", x, y-12, class)
	p.text(x+20, y, "", "start", name)
}

func sumOfSteps(s *attachSeries) (sum float64) {
	for _, part := range s.Steps {
		sum += max(part.Median, 0)
	}
	return sum
}
