package luks

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"strconv"
	"testing"
	"unicode/utf8"

	"pgregory.net/rapid"

	"voldek/internal/exit"
)

// sparse is an image that reads as zeros up to its size.
type sparse struct {
	image
	size int64
}

func (s sparse) ReadAt(p []byte, offset int64) (int, error) {
	n := int(min(max(s.size-offset, 0), int64(len(p))))
	clear(p[:n])
	if offset < int64(len(s.image)) {
		copy(p[:n], s.image[offset:])
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// read reads a header and checks what must hold of every answer.
func (s sparse) read(t rapid.TB) *Header {
	h, err := Read(s, s.size, Config{})
	if err != nil {
		if code := exit.Of(err); code != exit.BadHeader && code != exit.NoDevice {
			t.Fatalf("exit %d: %v", code, err)
		}
		return nil
	}
	g := h.Segment
	if g.Offset < h.MetadataSize || g.Length <= 0 || g.Offset+g.Length > s.size || g.Length%int64(g.SectorSize) != 0 ||
		cipherKeySizes[g.Cipher] == nil || len(h.digest.want) < luks1DigestSize || h.digest.iterations < 1 {
		t.Fatalf("accepted: %+v", h)
	}
	for _, slot := range h.slots {
		if slot.KDF.memory() > DefaultLimits().Argon2Memory || slot.KDF.Iterations > maxIterations ||
			slot.AreaOffset < h.HeaderSize || slot.AreaOffset+slot.AreaSize > h.MetadataSize {
			t.Fatalf("accepted: %+v", slot.Keyslot)
		}
	}
	if text, err := json.Marshal(h); err != nil || !utf8.Valid(text) {
		t.Fatalf("%s: %v", text, err)
	}
	return h
}

func FuzzLUKS1Header(f *testing.F) {
	img, _ := fixture(f, "luks1")
	f.Add([]byte(img[:luks1HeaderSize]))
	for _, e := range evil1 {
		changed := bytes.Clone(img)
		e.change(changed)
		f.Add(changed[:luks1HeaderSize])
	}
	f.Fuzz(func(t *testing.T, header []byte) {
		copy(img, header[:min(len(header), luks1HeaderSize)])
		sparse{img[:luks1HeaderSize], 4 << 20}.read(t)
	})
}

func FuzzLUKS2BinHeader(f *testing.F) {
	base, _ := fixture(f, "luks2")
	base = base[:2*fixtureHeaderSize]
	first, second := base[:512], base[fixtureHeaderSize:fixtureHeaderSize+512]
	f.Add([]byte(first), []byte(second), true)
	f.Add([]byte(first), []byte(second), false)
	f.Add([]byte(first), make([]byte, 512), true)
	f.Add(make([]byte, 512), []byte(second), false)
	f.Fuzz(func(t *testing.T, first, second []byte, seal bool) {
		img := bytes.Clone(base)
		copy(img[:512], first)
		copy(img[fixtureHeaderSize:fixtureHeaderSize+512], second)
		if seal {
			image(img).seal()
		}
		sparse{img, 16 << 20}.read(t)
	})
}

// Whatever is accepted as metadata must be JSON to encoding/json too, and mean the same.
func FuzzLUKS2JSON(f *testing.F) {
	base, _ := fixture(f, "luks2")
	base = base[:2*fixtureHeaderSize]
	f.Add(base.text())
	f.Add([]byte(`{"a":[1,-2.5e+3,true,false,null,"\ud83d\ude00\/\\\"\b\f\n\r\t"],"":{}}`))
	for _, e := range evil2 {
		img := bytes.Clone(base)
		e.change(img)
		f.Add(image(img).text())
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		n, err := parseJSON(text)
		var std any
		d := json.NewDecoder(bytes.NewReader(text))
		d.UseNumber()
		stdErr := d.Decode(&std)
		if err == nil && (stdErr != nil || !json.Valid(text) || !same(n, std)) {
			t.Fatalf("%q is accepted; encoding/json: %v %v", text, std, stdErr)
		}
		if err != nil || len(text) >= fixtureHeaderSize-binHeaderSize || bytes.IndexByte(text, 0) >= 0 {
			return
		}
		img := bytes.Clone(base)
		image(img).setText(text)
		if h := (sparse{img, 16 << 20}).read(t); h != nil {
			sameSegment(t, h.Segment, text)
		}
	})
}

// same tells whether a parsed value is what encoding/json, numbers kept as text, makes of it.
func same(n *node, std any) bool {
	switch v := std.(type) {
	case map[string]any:
		for i, name := range n.names {
			if item, ok := v[name]; !ok || !same(n.items[i], item) {
				return false
			}
		}
		return n.kind == objectKind && len(n.names) == len(v)
	case []any:
		for i := range min(len(v), len(n.items)) {
			if !same(n.items[i], v[i]) {
				return false
			}
		}
		return n.kind == arrayKind && len(n.items) == len(v)
	case string:
		return n.kind == stringKind && n.text == v
	case json.Number:
		return n.kind == numberKind && n.text == v.String()
	case bool:
		return n.kind == wordKind && n.text == strconv.FormatBool(v)
	}
	return n.kind == wordKind && n.text == "null"
}

func sameSegment(t *testing.T, s Segment, text []byte) {
	var std struct {
		Segments map[string]struct {
			Offset     string `json:"offset"`
			Size       string `json:"size"`
			IVTweak    string `json:"iv_tweak"`
			Encryption string `json:"encryption"`
			SectorSize int    `json:"sector_size"`
		} `json:"segments"`
	}
	if err := json.Unmarshal(text, &std); err != nil {
		t.Fatalf("encoding/json: %v", err)
	}
	v := std.Segments["0"]
	size := strconv.FormatInt(s.Length, 10)
	if s.Dynamic {
		size = "dynamic"
	}
	if len(std.Segments) != 1 || v.Offset != strconv.FormatInt(s.Offset, 10) || v.Size != size || v.Encryption != s.Cipher ||
		v.IVTweak != strconv.FormatUint(s.IVTweak, 10) || v.SectorSize != s.SectorSize {
		t.Fatalf("segment %+v, encoding/json has %+v", s, std.Segments)
	}
}

// Any change of the image, with right checksums or without, opens with the same volume key or not at all.
func TestFlippedBytesOpenTheSameKeyOrNothing(t *testing.T) {
	images, keys := map[string]image{}, map[string][]byte{}
	for _, name := range []string{"luks1", "luks2"} {
		images[name], keys[name] = fixture(t, name)
	}
	regions := map[string][][2]int{
		"luks1": {{0, luks1HeaderSize}, {104, 20 + 104}, {4096, 4096 + 64000}},
		"luks2": {{0, 512}, {binHeaderSize, binHeaderSize + len(images["luks2"].text())}, {fixtureHeaderSize, fixtureHeaderSize + 512},
			{fixtureHeaderSize + binHeaderSize, 2 * fixtureHeaderSize}, {32 << 10, 32<<10 + 128000}},
	}
	opened := map[bool]int{}
	rapid.Check(t, func(t *rapid.T) {
		name := rapid.SampledFrom([]string{"luks1", "luks2", "luks2"}).Draw(t, "image")
		img := image(bytes.Clone(images[name]))
		for range rapid.IntRange(1, 3).Draw(t, "flips") {
			region := rapid.SampledFrom(regions[name]).Draw(t, "region")
			img[rapid.IntRange(region[0], region[1]-1).Draw(t, "at")] ^= rapid.Byte().Draw(t, "mask")
		}
		if name == "luks2" && rapid.Bool().Draw(t, "seal") {
			copy(img[fixtureHeaderSize+binHeaderSize:2*fixtureHeaderSize], img[binHeaderSize:fixtureHeaderSize])
			img.seal()
		}
		h := sparse{img, int64(len(img))}.read(t)
		if h == nil || costly(h) {
			return
		}
		k, err := h.Unlock(context.Background(), []byte(fixturePassphrase), nil)
		opened[err == nil]++
		if errors.Is(err, ErrWrongKey) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		defer k.Key.Wipe()
		if !bytes.Equal(k.Key.Bytes(), keys[name]) {
			t.Fatal("opens with another key")
		}
	})
	if opened[true] == 0 || opened[false] == 0 {
		t.Errorf("%d opened, %d not: this test sees nothing", opened[true], opened[false])
	}
}

// costly tells of costs that are allowed but would take this test too long.
func costly(h *Header) bool {
	for _, s := range h.slots {
		if s.KDF.Iterations > 1e6 || s.KDF.Time*s.KDF.MemoryKiB > 1<<16 {
			return true
		}
	}
	return h.digest.iterations > 1e6
}
