package daemon

import (
	"maps"
	"os"
	"regexp"
	"slices"
	"testing"

	"voldek/daemon/api"
)

// The drawing above transitions is what people read; it must be what the machine does.
func TestDrawingIsTheMachine(t *testing.T) {
	source, err := os.ReadFile("state.go")
	if err != nil {
		t.Fatal(err)
	}
	drawn := map[api.State][]api.State{}
	for _, m := range regexp.MustCompile(`(?m)^//\t(\w+)\s+-> (\w+)`).FindAllSubmatch(source, -1) {
		from, to := api.State(m[1]), api.State(m[2])
		drawn[from] = append(drawn[from], to)
	}
	if len(drawn) == 0 {
		t.Fatal("no arrow found in state.go")
	}
	sorted := func(s []api.State) []api.State { return slices.Sorted(slices.Values(s)) }
	for _, state := range slices.Sorted(maps.Keys(transitions)) {
		if got, want := sorted(drawn[state]), sorted(transitions[state]); !slices.Equal(got, want) {
			t.Errorf("from %s: drawn %v, allowed %v", state, got, want)
		}
		delete(drawn, state)
	}
	if len(drawn) != 0 {
		t.Errorf("drawn but not allowed: %v", drawn)
	}
}

func TestAnArrowThatIsNotDrawnPanics(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("detached -> open was accepted")
		}
	}()
	mustBeArrow(api.Detached, api.Open)
}
