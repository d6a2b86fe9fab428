package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"voldek/blockdev"
	"voldek/daemon/api"
)

// journal keeps, one file a volume, what a later process must know to find an open volume again. It lies in /run, so it
// ends with the mappings it tells of, at the next boot. It holds no key.
type journal struct{ dir string }

// entry is written before an export is made, so that an export without an entry cannot exist.
type entry struct {
	Version     int               `json:"version"`
	Request     api.AttachRequest `json:"request"`
	Volume      api.Volume        `json:"volume"`       // Via is empty until the export is up
	LUKSVersion int               `json:"luks_version"` // 0: plain
}

const journalVersion = 1

func openJournal(dir string) (*journal, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	return &journal{dir: dir}, nil
}

func (j *journal) path(name string) string { return filepath.Join(j.dir, name+".json") }

// write replaces the entry of a volume in one step.
func (j *journal) write(e entry) error {
	e.Version = journalVersion
	data, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	temp := filepath.Join(j.dir, "."+e.Request.Name+".new")
	if err := os.WriteFile(temp, data, 0o600); err != nil {
		_ = os.Remove(temp)
		return fmt.Errorf("journal: %w", err)
	}
	if err := os.Rename(temp, j.path(e.Request.Name)); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	return nil
}

func (j *journal) remove(name string) error {
	if err := os.Remove(j.path(name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("journal: %w", err)
	}
	return nil
}

// read returns all entries. A file that cannot be understood is reported and left where it is.
func (j *journal) read() (entries []entry, problems []error) {
	files, err := os.ReadDir(j.dir)
	if err != nil {
		return nil, []error{fmt.Errorf("journal: %w", err)}
	}
	for _, file := range files {
		name, isEntry := strings.CutSuffix(file.Name(), ".json")
		if !isEntry {
			continue
		}
		e, err := j.readOne(name)
		if err != nil {
			problems = append(problems, fmt.Errorf("journal %s: %w", file.Name(), err))
			continue
		}
		entries = append(entries, e)
	}
	return entries, problems
}

func (j *journal) readOne(name string) (entry, error) {
	var e entry
	data, err := os.ReadFile(j.path(name))
	if err != nil {
		return e, err
	}
	if err := json.Unmarshal(data, &e); err != nil {
		return e, err
	}
	if e.Version != journalVersion {
		return e, fmt.Errorf("version %d is unknown here", e.Version)
	}
	if err := blockdev.CheckName(e.Request.Name); err != nil {
		return e, err
	}
	if e.Request.Name != name {
		return e, fmt.Errorf("it is about %s", e.Request.Name)
	}
	return e, nil
}
