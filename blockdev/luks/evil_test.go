package luks

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	"voldek/internal/exit"
)

// evil is one way of lying in a header. change is done to a valid image, with right checksums afterwards.
type evil struct {
	sin    string
	field  string // the error must name it
	change func(image)
}

// set returns the change of one value in the metadata.
func set(path string, value any) func(image) { return func(img image) { img.set(path, value) } }

// swap returns the replacement of a piece of the metadata's text, which need not stay JSON.
func swap(old, new string) func(image) { return func(img image) { img.replace(old, new) } }

// put returns the change of bytes in the binary part of both headers.
func put(at int, b ...byte) func(image) { return func(img image) { img.put(at, b...) } }

type object = map[string]any

// all returns one change after the other.
func all(changes ...func(image)) func(image) {
	return func(img image) {
		for _, change := range changes {
			change(img)
		}
	}
}

func require(kind, what string) func(image) {
	return set("config.requirements", object{kind: []string{what}})
}

var segment = object{
	"type": "crypt", "offset": "557056", "size": "4096", "iv_tweak": "0", "encryption": "aes-xts-plain64", "sector_size": 512,
}

func nested(depth int) string { return strings.Repeat("[", depth) + strings.Repeat("]", depth) }

var evil2 = []evil{
	// The binary header.
	{"bothChecksumsWrong", "primary header: checksum", func(img image) { img[100]++; img[fixtureHeaderSize+100]++ }},
	{"checksumUnknown", "checksum_alg", put(72, []byte("crc32\x00\x00")...)},
	{"checksumEmptyName", "checksum_alg", put(72, 0)},
	{"checksumWhirlpool", "checksum_alg", put(72, []byte("whirlpool\x00")...)},
	{"versionThree", "version 3", put(6, 0, 3)},
	{"versionZero", "version 0", put(6, 0, 0)},
	{"headerSizeOdd", "hdr_size", put(8, be64(fixtureHeaderSize+4096)...)},
	{"headerSizeZero", "hdr_size", put(8, be64(0)...)},
	{"headerSizeHuge", "hdr_size", put(8, be64(1<<63)...)},
	{"headerSizeWrapsInt64", "hdr_size", put(8, be64(1<<64-4096)...)},
	{"headerSizePastTheEnd", "hdr_size", put(8, be64(4<<20)...)},
	{"headerOffsetElsewhere", "hdr_offset", put(256, be64(8192)...)},
	{"headersOfTwoVolumes", "uuid", func(img image) { copy(img[fixtureHeaderSize+168:], "0"); img[168] = 'f'; img.seal() }},
	{"sameSequenceOtherText", "json: the two headers differ", func(img image) {
		img[fixtureHeaderSize+binHeaderSize+1] = ' '
		img.seal()
	}},
	{"uuidNotOne", "uuid", put(168, []byte("not-a-uuid\x00")...)},
	{"uuidWithoutEnd", "uuid", put(168, bytes.Repeat([]byte("a"), 40)...)},
	{"uuidShort", "uuid", put(168+35, 0)},
	{"uuidSlash", "uuid", put(168, '/')},
	{"labelWithoutEnd", "label", put(24, bytes.Repeat([]byte("a"), 48)...)},
	{"subsystemWithoutEnd", "subsystem", put(208, bytes.Repeat([]byte("a"), 48)...)},

	// The JSON text.
	{"jsonWithoutNUL", "json: not one text", func(img image) { img.setText(bytes.Repeat([]byte(" "), fixtureHeaderSize-binHeaderSize)) }},
	{"jsonAfterNUL", "json: not one text", func(img image) { img.setText(append(img.text(), "\x00{}"...)) }},
	{"jsonEmpty", "json", func(img image) { img.setText(nil) }},
	{"jsonTwoTexts", "text after the end", func(img image) { img.setText(append(img.text(), "{}"...)) }},
	{"jsonCutOff", "ends in the middle", func(img image) { img.setText(img.text()[:900]) }},
	{"jsonTrailingComma", "json", swap(`"tokens":`, `,"tokens":`)},
	{"jsonComment", "json", swap(`"tokens":`, `/**/"tokens":`)},
	{"jsonNotUTF8", "json", swap(`voldek-test`, "voldek\xff")},
	{"jsonOverlongUTF8", "json", swap(`voldek-test`, "voldek\xc0\xaf")},
	{"jsonLoneSurrogate", "json", swap(`voldek-test`, `voldek\ud800`)},
	{"jsonHalfSurrogatePair", "json", swap(`voldek-test`, `voldek\ud800\u0041`)},
	{"jsonBadEscape", "json", swap(`voldek-test`, `voldek\u00zz`)},
	{"jsonNULInString", "json", swap(`voldek-test`, `voldek\u0000`)},
	{"jsonControlInString", "json", swap(`voldek-test`, "voldek\n")},
	{"jsonTooDeep", "json", swap(`-1.5e3`, nested(16))},
	{"jsonBottomless", "json", func(img image) { img.setText([]byte(strings.Repeat("[", fixtureHeaderSize-binHeaderSize-1))) }},
	{"jsonNotAnObject", "an array where an object", func(img image) { img.setText([]byte("[]")) }},
	{"duplicateKey", `"segments" appears twice`, swap(`"segments":{`, `"segments":{},"segments":{`)},
	{"duplicateKeyEscaped", `"segments" appears twice`, swap(`"segments":{`, `"\u0073egments":{},"segments":{`)},
	{"duplicateKeyDeep", `"iterations" appears twice`, swap(`"iterations":`, `"iterations":1000,"iterations":`)},
	{"duplicateKeyInToken", `"ref" appears twice`, swap(`"ref":`, `"ref":1,"ref":`)},
	{"nameInOtherCase", "Segments", swap(`"tokens":`, `"Segments":{},"tokens":`)},
	{"unknownTopField", "extras", set("extras", object{})},
	{"missingTopField", "digests: missing", set("digests", nil)},

	// config
	{"jsonSizeOther", "config.json_size", set("config.json_size", "16384")},
	{"jsonSizeNumber", "config.json_size", set("config.json_size", 12288)},
	{"keyslotsSizeUnaligned", "config.keyslots_size", set("config.keyslots_size", "524289")},
	{"keyslotsSizeHuge", "config.keyslots_size", set("config.keyslots_size", "18446744073709547520")},
	{"keyslotsSizeOverData", "segments.0.offset", set("config.keyslots_size", "8388608")},
	{"flagUnknown", "config.flags", set("config.flags", []string{"allow-discards", "no-encryption"})},
	{"flagsNotArray", "config.flags", set("config.flags", object{})},
	{"requirementReencrypt", "config.requirements.mandatory: online-reencrypt-v2", require("mandatory", "online-reencrypt-v2")},
	{"requirementUnknown", "config.requirements.mandatory", require("mandatory", "later")},
	{"requirementsArray", "config.requirements", set("config.requirements", []string{"offline-reencrypt"})},
	{"requirementsString", "config.requirements.mandatory", set("config.requirements", object{"mandatory": "later"})},
	{"requirementsOtherForm", "config.requirements.optional", require("optional", "later")},

	// segments
	{"noSegment", "segments", set("segments", object{})},
	{"twoSegments", "segments", set("segments.1", segment)},
	{"segmentNotZero", "segments", set("segments", object{"1": segment})},
	{"segmentNegativeName", "segments.-1", set("segments.-1", segment)},
	{"segmentZeroZero", "segments.00", set("segments.00", segment)},
	{"segmentLinear", "segments.0.type", set("segments.0.type", "linear")},
	{"segmentOpal", "segments.0.type", set("segments.0.type", "hw-opal-crypt")},
	{"segmentIntegrity", "segments.0.integrity", set("segments.0.integrity", object{"type": "hmac(sha256)"})},
	{"segmentBackup", "segments.0.flags", set("segments.0.flags", []string{"backup-final"})},
	{"segmentInReencryption", "segments.0.flags", set("segments.0.flags", []string{"in-reencryption"})},
	{"segmentNullCipher", "segments.0.encryption", set("segments.0.encryption", "cipher_null-ecb")},
	{"segmentEmptyCipher", "segments.0.encryption", set("segments.0.encryption", "")},
	{"segmentECB", "segments.0.encryption", set("segments.0.encryption", "aes-ecb")},
	{"segmentCAPI", "segments.0.encryption", set("segments.0.encryption", "capi:xts(ecb(aes-generic))-plain64")},
	{"segmentCipherWithTableFields", "segments.0.encryption", set("segments.0.encryption", "aes-xts-plain64 00 0 /dev/null 0")},
	{"segmentCipherUpperCase", "segments.0.encryption", set("segments.0.encryption", "AES-XTS-PLAIN64")},
	{"keySizeForOtherCipher", "keyslots.0.key_size", set("keyslots.0.key_size", 16)},
	{"sectorSizeZero", "segments.0.sector_size", set("segments.0.sector_size", 0)},
	{"sectorSizeOdd", "segments.0.sector_size", set("segments.0.sector_size", 513)},
	{"sectorSizeHuge", "segments.0.sector_size", set("segments.0.sector_size", int64(1<<40))},
	{"sectorSizeString", "segments.0.sector_size", set("segments.0.sector_size", "512")},
	{"sectorSizeFraction", "segments.0.sector_size", swap(`"sector_size":512`, `"sector_size":512.0`)},
	{"sectorSizeExponent", "segments.0.sector_size", swap(`"sector_size":512`, `"sector_size":512e0`)},
	{"offsetInsideHeader", "segments.0.offset", set("segments.0.offset", "0")},
	{"offsetInsideKeyslots", "segments.0.offset", set("segments.0.offset", "556544")},
	{"offsetUnaligned", "segments.0.offset", set("segments.0.offset", "557057")},
	{"offsetAtTheEnd", "segments.0.offset", set("segments.0.offset", "655360")},
	{"offsetPastTheEnd", "segments.0.offset", set("segments.0.offset", "1099511627776")},
	{"offsetOverflow", "segments.0.offset", set("segments.0.offset", "18446744073709551104")},
	{"offsetOver64Bits", "segments.0.offset", set("segments.0.offset", "18446744073709551616")},
	{"offsetNegative", "segments.0.offset", set("segments.0.offset", "-512")},
	{"offsetPlus", "segments.0.offset", set("segments.0.offset", "+557056")},
	{"offsetLeadingZero", "segments.0.offset", set("segments.0.offset", "0557056")},
	{"offsetNumber", "segments.0.offset", set("segments.0.offset", 557056)},
	{"sizeZero", "segments.0.size", set("segments.0.size", "0")},
	{"sizeNegative", "segments.0.size", set("segments.0.size", "-4096")},
	{"sizeUnaligned", "segments.0.size", all(set("segments.0.sector_size", 4096), set("segments.0.size", "512"))},
	{"sizePastTheEnd", "segments.0.size", set("segments.0.size", "98816")},
	{"sizeOverflow", "segments.0.size", set("segments.0.size", "9223372036854775808")},
	{"sizeOtherWord", "segments.0.size", set("segments.0.size", "Dynamic")},
	{"ivTweakNegative", "segments.0.iv_tweak", set("segments.0.iv_tweak", "-1")},
	{"ivTweakOverflow", "segments.0.iv_tweak", set("segments.0.iv_tweak", "18446744073709551615")},

	// digests
	{"noDigest", "digests", set("digests", object{})},
	{"digestOfNoSegment", "digests", set("digests.0.segments", []string{})},
	{"digestOfOtherSegment", "digests.0.segments", set("digests.0.segments", []string{"1"})},
	{"twoDigestsOfSegment", "digests.1.segments", set("digests.1.segments", []string{"0"})},
	{"keyslotInTwoDigests", "digests.1.keyslots", set("digests.1.keyslots", []string{"5", "0"})},
	{"keyslotTwiceInDigest", "digests.0.keyslots", set("digests.0.keyslots", []string{"0", "0", "1"})},
	{"keyslotInNoDigest", "keyslots.5", set("digests.1.keyslots", []string{})},
	{"digestOfMissingKeyslot", "digests.0.keyslots", set("digests.0.keyslots", []string{"0", "1", "7"})},
	{"digestKeyslotsNumbers", "digests.0.keyslots", set("digests.0.keyslots", []int{0, 1})},
	{"digestEmpty", "digests.0.digest", set("digests.0.digest", "")},
	{"digestShort", "digests.0.digest", set("digests.0.digest", "AAAA")},
	{"digestLong", "digests.0.digest", set("digests.0.digest", strings.Repeat("AAAA", 11))},
	{"digestNotBase64", "digests.0.digest", set("digests.0.digest", "!!!!")},
	{"digestBase64WithLineEnd", "digests.0.digest", swap(`"digest":"`, `"digest":"\n`)},
	{"digestHashUnknown", "digests.0.hash", set("digests.0.hash", "md5")},
	{"digestHashEmpty", "digests.0.hash", set("digests.0.hash", "")},
	{"digestTypeUnknown", "digests.0.type", set("digests.0.type", "none")},
	{"digestIterationsZero", "digests.0.iterations", set("digests.0.iterations", 0)},
	{"digestIterationsNegative", "digests.0.iterations", set("digests.0.iterations", -1)},
	{"digestIterationsHuge", "digests.0.iterations", set("digests.0.iterations", 1<<31-1)},
	{"digestSaltEmpty", "digests.0.salt", set("digests.0.salt", "")},

	// keyslots
	{"keyslotReencrypt", "keyslots.0.type", set("keyslots.0.type", "reencrypt")},
	{"keyslotWithoutType", "keyslots.0.type", set("keyslots.0.type", nil)},
	{"keyslotNumber32", "keyslots.32", set("keyslots.32", object{})},
	{"keyslotUnknownField", "keyslots.0.mode", set("keyslots.0.mode", "reencrypt")},
	{"keyslotKeySizeZero", "keyslots.0.key_size", set("keyslots.0.key_size", 0)},
	{"keyslotKeySizeHuge", "keyslots.0.key_size", set("keyslots.0.key_size", int64(1<<40))},
	{"keyslotKeySizeWraps", "keyslots.0.key_size", set("keyslots.0.key_size", 1<<30)},
	{"keyslotKeySizeOther", "keyslots.1.key_size", all(
		set("keyslots.1.key_size", 64), set("keyslots.5.area.offset", "425984"), set("keyslots.1.area.size", "262144"))},
	{"unboundKeySizeHuge", "keyslots.5.area.size", set("keyslots.5.key_size", 1<<31-1)},
	{"unboundKeySizeZero", "keyslots.5.key_size", set("keyslots.5.key_size", 0)},
	{"keyslotPriorityThree", "keyslots.0.priority", set("keyslots.0.priority", 3)},
	{"afUnknown", "keyslots.0.af.type", set("keyslots.0.af.type", "none")},
	{"afStripesOne", "keyslots.0.af.stripes", set("keyslots.0.af.stripes", 1)},
	{"afStripesHuge", "keyslots.0.af.stripes", set("keyslots.0.af.stripes", 1<<31-1)},
	{"afHashUnknown", "keyslots.0.af.hash", set("keyslots.0.af.hash", "crc32")},
	{"areaNullCipher", "keyslots.0.area.encryption", set("keyslots.0.area.encryption", "cipher_null-ecb")},
	{"areaCAPI", "keyslots.0.area.encryption", set("keyslots.0.area.encryption", "capi:xts(aes)-plain64")},
	{"areaKeySizeOdd", "keyslots.0.area.key_size", set("keyslots.0.area.key_size", 48)},
	{"areaKeySizeHuge", "keyslots.0.area.key_size", set("keyslots.0.area.key_size", 1<<31-1)},
	{"areaJournal", "keyslots.0.area.type", set("keyslots.0.area.type", "journal")},
	{"areaInsideHeader", "keyslots.0.area.offset", set("keyslots.0.area.offset", "16384")},
	{"areaUnaligned", "keyslots.0.area.offset", set("keyslots.0.area.offset", "32769")},
	{"areaInsideData", "keyslots.0.area", set("keyslots.0.area.offset", "557056")},
	{"areaPastKeyslots", "keyslots.0.area.size", set("keyslots.0.area.size", "16777216")},
	{"areaOverflow", "keyslots.0.area.size", set("keyslots.0.area.size", "18446744073709518848")},
	{"areaTooSmall", "keyslots.0.area.size", set("keyslots.0.area.size", "4096")},
	{"keyslotOverlapsAnother", "keyslots.1.area.offset", set("keyslots.0.area.size", "131584")},
	{"keyslotOnTopOfAnother", "area.offset", set("keyslots.5.area.offset", "32768")},

	// kdf
	{"kdfUnknown", "keyslots.0.kdf.type", set("keyslots.0.kdf.type", "scrypt")},
	{"kdfArgon2d", "keyslots.0.kdf.type", set("keyslots.0.kdf.type", "argon2d")},
	{"kdfNotAnObject", "keyslots.0.kdf.type", set("keyslots.0.kdf", "pbkdf2")},
	{"argon2WithIterations", "keyslots.0.kdf.iterations", set("keyslots.0.kdf.iterations", 1)},
	{"argon2MemoryHuge", "keyslots.0.kdf.memory", set("keyslots.0.kdf.memory", 1<<31-1)},
	{"argon2MemoryOverLimit", "keyslots.0.kdf.memory: 2 GiB is over the limit of 1 GiB", set("keyslots.0.kdf.memory", 2<<20)},
	{"argon2MemoryZero", "keyslots.0.kdf.memory", set("keyslots.0.kdf.memory", 0)},
	{"argon2MemoryUnderCPUs", "keyslots.0.kdf.memory", all(set("keyslots.0.kdf.cpus", 4), set("keyslots.0.kdf.memory", 31))},
	{"argon2TimeZero", "keyslots.0.kdf.time", set("keyslots.0.kdf.time", 0)},
	{"argon2TimeHuge", "keyslots.0.kdf.time", set("keyslots.0.kdf.time", 1<<31-1)},
	{"argon2CPUsZero", "keyslots.0.kdf.cpus", set("keyslots.0.kdf.cpus", 0)},
	{"argon2CPUsWrap", "keyslots.0.kdf.cpus", set("keyslots.0.kdf.cpus", 257)},
	{"argon2SaltEmpty", "keyslots.0.kdf.salt", set("keyslots.0.kdf.salt", "")},
	{"argon2SaltHuge", "keyslots.0.kdf.salt", set("keyslots.0.kdf.salt", strings.Repeat("AAAA", 22))},
	{"pbkdf2IterationsHuge", "keyslots.1.kdf.iterations", set("keyslots.1.kdf.iterations", 1<<31-1)},
	{"pbkdf2IterationsFew", "keyslots.1.kdf.iterations", set("keyslots.1.kdf.iterations", 1)},
	{"pbkdf2HashUnknown", "keyslots.1.kdf.hash", set("keyslots.1.kdf.hash", "null")},
	{"unboundKDFHuge", "keyslots.5.kdf.iterations", set("keyslots.5.kdf.iterations", 1<<31-1)},

	// tokens
	{"tokenWithoutType", "tokens.0.type", set("tokens.0.type", nil)},
	{"tokenWithoutKeyslots", "tokens.0.keyslots", set("tokens.0.keyslots", nil)},
	{"tokenOfMissingKeyslot", "tokens.0.keyslots", set("tokens.0.keyslots", []string{"9"})},
	{"tokenKeyslotTwice", "tokens.0.keyslots", set("tokens.0.keyslots", []string{"0", "0"})},
	{"tokenKeyslotZeroZero", "tokens.0.keyslots", set("tokens.0.keyslots", []string{"00"})},
	{"tokenTypeNumber", "tokens.0.type", set("tokens.0.type", 5)},
	{"tokensArray", "tokens", set("tokens", []string{})},
	{"tokenNotAnObject", "tokens.0", set("tokens.0", "x")},
	{"tokensMany", "tokens.32", set("tokens.32", object{})},
}

// put1 returns the change of bytes in a LUKS1 header.
func put1(at int, b ...byte) func(image) { return func(img image) { copy(img[at:], b) } }

const slot1 = 208 + 48 // the second key slot of a LUKS1 header

var evil1 = []evil{
	{"luks1CipherNull", "cipher", put1(8, []byte("cipher_null\x00")...)},
	{"luks1CipherECB", "cipher", put1(40, []byte("ecb\x00")...)},
	{"luks1CipherWithoutEnd", "cipher", put1(8, bytes.Repeat([]byte("a"), 32)...)},
	{"luks1ModeCAPI", "cipher", put1(8, []byte("capi:cbc(aes)\x00")...)},
	{"luks1HashUnknown", "hash_spec", put1(72, []byte("ripemd160\x00")...)},
	{"luks1HashEmpty", "hash_spec", put1(72, 0)},
	{"luks1KeyBytesZero", "key_bytes", put1(108, be32(0)...)},
	{"luks1KeyBytesOfXTS", "key_bytes", put1(108, be32(64)...)},
	{"luks1KeyBytesOverflow", "key_bytes", put1(108, be32(0x7fffff00)...)},
	{"luks1KeyBytesTimesStripesWraps", "key_bytes", put1(108, be32(1<<31)...)},
	{"luks1PayloadZero", "payload_offset", put1(104, be32(0)...)},
	{"luks1PayloadInsideSlots", "payload_offset", put1(104, be32(16)...)},
	{"luks1PayloadPastTheEnd", "payload_offset", put1(104, be32(1<<32-1)...)},
	{"luks1DigestIterationsZero", "mk_digest_iter", put1(164, be32(0)...)},
	{"luks1DigestIterationsHuge", "mk_digest_iter", put1(164, be32(1<<32-1)...)},
	{"luks1UUIDNotOne", "uuid", put1(168, []byte("../../etc/passwd\x00")...)},
	{"luks1SlotNeitherOnNorOff", "keyslots.1.active", put1(slot1, be32(1)...)},
	{"luks1SlotIterationsHuge", "keyslots.0.iterations", put1(212, be32(1<<32-1)...)},
	{"luks1SlotIterationsFew", "keyslots.0.iterations", put1(212, be32(10)...)},
	{"luks1SlotInsideHeader", "keyslots.1.key_material_offset", put1(slot1+40, be32(1)...)},
	{"luks1SlotPastTheEnd", "payload_offset", put1(slot1+40, be32(1<<32-1)...)},
	{"luks1SlotOverlap", "keyslots.1.area.offset", put1(slot1+40, be32(9)...)},
	{"luks1StripesZero", "keyslots.0.stripes", put1(208+44, be32(0)...)},
	{"luks1StripesOverflow", "keyslots.0.stripes", put1(208+44, be32(0x10000001)...)},
}

func TestEvilHeadersAreRefused(t *testing.T) {
	for name, table := range map[string][]evil{"luks1": evil1, "luks2": evil2} {
		base, want := fixture(t, name)
		if _, key, err := base.open(Config{}, fixturePassphrase); err != nil || !bytes.Equal(key, want) {
			t.Fatalf("%s: the image without a sin must open: %v", name, err)
		}
		t.Logf("%s: %d sins", name, len(table))
		for _, e := range table {
			t.Run(e.sin, func(t *testing.T) {
				img := bytes.Clone(base)
				e.change(img)
				mustRefuse(t, img, e.field)
			})
		}
	}
}

func TestEvilHeadersWithoutTheirEnd(t *testing.T) {
	for _, c := range []struct {
		name, fixture string
		size          int
		field         string
	}{
		{"luks1SlotCutOff", "luks1", 4096 + 1000, "payload_offset"},
		{"luks1HeaderCutOff", "luks1", 591, "cut off"},
		{"headerCutOff", "luks2", 8192, "hdr_size"},
		{"binaryHeaderCutOff", "luks2", 4095, "cut off"},
		{"keyslotsCutOff", "luks2", 100 << 10, "segments.0.offset"},
		{"dataCutOff", "luks2", 557056, "segments.0.offset"},
		{"dataLessThanASector", "luks2", 557056 + 511, "segments.0.offset"},
	} {
		t.Run(c.name, func(t *testing.T) {
			img, _ := fixture(t, c.fixture)
			mustRefuse(t, img[:c.size], c.field)
		})
	}
}

// mustRefuse fails the test unless verdict finds the refusal right.
func mustRefuse(t *testing.T, img image, field string) {
	t.Helper()
	if err := verdict(img, field); err != nil {
		t.Error(err)
	}
}

// verdict opens an image and wants exit code 17, the field in the message, within a second and 64 MiB.
func verdict(img image, field string) error {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	start := time.Now()
	_, _, err := img.open(Config{}, fixturePassphrase)
	took := time.Since(start)
	runtime.ReadMemStats(&after)
	switch allocated := after.TotalAlloc - before.TotalAlloc; {
	case exit.Of(err) != exit.BadHeader || !strings.Contains(err.Error(), field):
		return fmt.Errorf("want exit 17 and %q, got exit %d: %v", field, exit.Of(err), err)
	case took > time.Second:
		return fmt.Errorf("took %v", took)
	case allocated > 64<<20:
		return fmt.Errorf("allocated %d MiB", allocated>>20)
	}
	return nil
}

// The most work that a header of the largest size can make before it is refused.
func TestLargestHeadersAreRefusedSoon(t *testing.T) {
	base, _ := fixture(t, "luks2")
	const size, room = 4 << 20, 4<<20 - binHeaderSize
	names := []byte("{")
	for n := 0; len(names) < room-20; n++ {
		names = fmt.Appendf(names, `"%x":0,`, n)
	}
	texts := map[string][]byte{
		"values":  []byte("[" + strings.Repeat("[],", room/3-1)),
		"names":   names,
		"string":  []byte(`{"tokens":{"0":{"x":"` + strings.Repeat("a", room-100) + `"}}}`),
		"escapes": []byte(`{"tokens":{"0":{"x":"` + strings.Repeat(`\u0061`, room/6-100) + `"}}}`),
	}
	for name, text := range texts {
		t.Run(name, func(t *testing.T) {
			img := make(image, 9<<20)
			copy(img, base[:binHeaderSize])
			copy(img[8:], be64(size))
			copy(img[binHeaderSize:], text)
			clear(img[448:512])
			sum := sha256.Sum256(img[:size])
			copy(img[448:], sum[:])
			mustRefuse(t, img, "LUKS header refused: ")
		})
	}
	t.Run("a false second header at every place", func(t *testing.T) {
		img := make(image, 9<<20)
		for _, at := range headerSizes {
			copy(img[at:], base[fixtureHeaderSize:][:binHeaderSize])
			copy(img[at+8:], be64(uint64(at)))
			copy(img[at+256:], be64(uint64(at)))
		}
		mustRefuse(t, img, "secondary header: checksum")
	})
}

func TestVerdictIsNotAlwaysRight(t *testing.T) {
	valid, _ := fixture(t, "luks2")
	costly, other := bytes.Clone(valid), bytes.Clone(valid)
	image(costly).set("keyslots.0.kdf.memory", 80<<10)
	set("segments.0.encryption", "")(other)
	for name, img := range map[string]image{"opens": valid, "opens after 80 MiB": costly, "another field": other} {
		if verdict(img, "segments.0.offset") == nil {
			t.Errorf("%s: passes as a refusal", name)
		}
	}
}

func TestAllowedChangesStillOpen(t *testing.T) {
	base, want := fixture(t, "luks2")
	for _, c := range []struct {
		name   string
		change func(image)
		look   func(*Header) bool
	}{
		{"nothing", func(image) {}, func(h *Header) bool {
			return h.Label == "pg-data" && h.Subsystem == "voldek" && h.Copy == "primary" && h.Damaged == "" &&
				len(h.Keyslots) == 3 && h.Keyslots[1].Priority == "prefer" && !h.Keyslots[2].Bound && h.Tokens[0].Type == "voldek-test"
		}},
		{"white space", func(img image) {
			img.setText(append(bytes.ReplaceAll(img.text(), []byte(`":`), []byte("\" :\n\t")), " \r\n"...))
		}, nil},
		{"escapes", swap(`"encryption":"aes-xts-plain64"`, `"encrypt\u0069on":"aes\u002Dxts-plain64"`), nil},
		{"fixed size", set("segments.0.size", "98304"), func(h *Header) bool {
			return h.Segment.Length == 98304 && !h.Segment.Dynamic
		}},
		{"iv_tweak", set("segments.0.iv_tweak", "18446744073709551423"), func(h *Header) bool { return h.Segment.IVTweak == 1<<64-193 }},
		{"sector size 4096", set("segments.0.sector_size", 4096), func(h *Header) bool { return h.Segment.Length == 98304 }},
		{"later offset", set("segments.0.offset", "557568"), func(h *Header) bool {
			return h.Segment.Offset == 557568 && h.Segment.Length == 97792
		}},
		{"all flags", set("config.flags", activationFlags), func(h *Header) bool { return len(h.Flags) == 6 }},
		{"requirements empty", set("config.requirements", object{"mandatory": []string{}}), nil},
		{"priority normal", set("keyslots.1.priority", nil), func(h *Header) bool { return h.Keyslots[1].Priority == "normal" }},
		{"checksum sha512", put(72, []byte("sha512\x00")...), nil},
		{"checksum sha1", put(72, []byte("sha1\x00\x00\x00")...), nil},
		{"deep token", swap(`-1.5e3`, nested(13)), nil},
		{"no token", set("tokens", object{}), func(h *Header) bool { return len(h.Tokens) == 0 }},
		{"control characters in the label", put(24, []byte("a\x1b[2J\x00")...), func(h *Header) bool { return h.Label == "a\ufffd[2J" }},
		{"UUID in upper case", func(img image) { img.put(168, bytes.ToUpper(img[168:204])...) }, nil},
		{"unbound slot of odd size", set("keyslots.5.key_size", 20), func(h *Header) bool { return h.Keyslots[2].KeySize == 20 }},
		{"primary zeroed", func(img image) { clear(img[:4096]) }, func(h *Header) bool { return h.Copy == "secondary" && h.Damaged != "" }},
		{"primary version damaged", func(img image) { img[7] = 9 }, func(h *Header) bool { return h.Copy == "secondary" }},
		{"primary header size damaged", func(img image) { img[13]++ }, func(h *Header) bool { return h.Copy == "secondary" }},
		{"primary JSON damaged", func(img image) { img[5000]++ }, func(h *Header) bool {
			return h.Copy == "secondary" && h.Damaged == "primary header: checksum does not match"
		}},
		{"secondary zeroed", func(img image) { clear(img[16384:32768]) }, func(h *Header) bool {
			return h.Copy == "primary" && h.Damaged == "secondary header: no LUKS2 magic"
		}},
		{"secondary newer", func(img image) { copy(img[16384+16:], be64(99)); img.seal() }, func(h *Header) bool {
			return h.Copy == "secondary" && h.SequenceID == 99
		}},
		{"secondary older", func(img image) { copy(img[16384+16:], be64(1)); img.seal() }, func(h *Header) bool {
			return h.Copy == "primary" && strings.Contains(h.Damaged, "sequence id 1 is older")
		}},
		{"secondary older with other text", func(img image) {
			copy(img[16384+16:], be64(1))
			img[16384+4096] = 'x'
			img.seal()
		}, func(h *Header) bool { return h.Copy == "primary" }},
	} {
		t.Run(c.name, func(t *testing.T) {
			img := bytes.Clone(base)
			c.change(img)
			h, key, err := image(img).open(Config{}, fixturePassphrase)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(key, want) {
				t.Error("another volume key")
			}
			if c.look != nil && !c.look(h) {
				t.Errorf("unexpected header %+v", h)
			}
		})
	}
}

func TestNotLUKS(t *testing.T) {
	base, _ := fixture(t, "luks2")
	zeroed := bytes.Clone(base)
	clear(zeroed[:32<<10])
	moved := append(make([]byte, 8192), base...)
	for name, img := range map[string]image{"empty": nil, "short": base[:5], "zeros": make([]byte, 8<<20), "zeroed": zeroed, "moved": moved} {
		if _, _, err := img.open(Config{}, fixturePassphrase); exit.Of(err) != exit.NoDevice {
			t.Errorf("%s: %v", name, err)
		}
	}
}
