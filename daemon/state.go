package daemon

import (
	"fmt"
	"slices"

	"voldek/daemon/api"
)

// A volume's way, one arrow a line. The test reads these lines and compares them with transitions.
//
//	detached  -> fetching    attach
//	fetching  -> unlocking   the key is here
//	fetching  -> detached    the callers gave up
//	fetching  -> failed      no device, bad header, no key
//	unlocking -> fetching    the key opens no slot, another reference is left
//	unlocking -> open        the export is up
//	unlocking -> detached    the callers gave up
//	unlocking -> failed      wrong key, no backend
//	open      -> closing     detach
//	open      -> detached    somebody else took the export down
//	closing   -> detached    the device is given back
//	closing   -> open        in use, nothing was changed
//	failed    -> fetching    attach again
//	failed    -> detached    detach
var transitions = map[api.State][]api.State{
	api.Detached:  {api.Fetching},
	api.Fetching:  {api.Unlocking, api.Detached, api.Failed},
	api.Unlocking: {api.Fetching, api.Open, api.Detached, api.Failed},
	api.Open:      {api.Closing, api.Detached},
	api.Closing:   {api.Detached, api.Open},
	api.Failed:    {api.Fetching, api.Detached},
}

// mustBeArrow panics where the drawing has no arrow from one state to the other: that is a fault of ours.
func mustBeArrow(from, to api.State) {
	if !slices.Contains(transitions[from], to) {
		panic(fmt.Sprintf("daemon: no way from %s to %s", from, to))
	}
}
