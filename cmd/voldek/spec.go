package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"github.com/spf13/pflag"

	"voldek/blockdev"
	"voldek/internal/cli"
	"voldek/internal/config"
	"voldek/internal/secret"
	"voldek/internal/unlock"
	"voldek/keyclient"
)

// specFlags declares the flags that describe a volume. dataOffset is what the plain mode's offset is called.
func specFlags(flags *pflag.FlagSet, spec *blockdev.Spec, dataOffset string) {
	flags.StringVar(&spec.Header, "header", "", "detached LUKS header")
	flags.StringVar(&spec.Type, "type", blockdev.TypeLUKS, "luks or plain")
	flags.StringVar(&spec.Cipher, "cipher", "", "plain: aes-xts-plain64 (default) or aes-xts-plain")
	flags.IntVar(&spec.KeySize, "key-size", 0, "plain: bits, 256 or 512 (default)")
	flags.StringVar(&spec.Hash, "hash", "", "plain: how the key becomes the volume key: ripemd160, sha256 or plain")
	flags.Uint64Var(&spec.Offset, dataOffset, 0, "plain: start of the data, in 512-byte sectors")
	flags.Uint64Var(&spec.Skip, "skip", 0, "plain: added to the IV, in 512-byte sectors")
	flags.IntVar(&spec.SectorSize, "sector-size", 0, "plain: encryption sector in bytes (default 512)")
}

// keyFlag declares --key.
func keyFlag(flags *pflag.FlagSet, keys *[]string) {
	flags.StringArrayVar(keys, "key", nil,
		"key reference: barbican:UUID[@SERVICE], kms:SERVICE[/KEY-ID], file:PATH, credential:NAME, - , ask or token; may be repeated")
}

// complete makes the paths absolute and names the volume after its device where no name was given.
func (c *command) complete(spec *blockdev.Spec, device string) (err error) {
	c.about.Device = device
	if spec.Device, err = filepath.Abs(device); err != nil {
		return err
	}
	if spec.Header != "" {
		if spec.Header, err = filepath.Abs(spec.Header); err != nil {
			return err
		}
	}
	if spec.Name == "" {
		spec.Name = nameOf(device)
	}
	return spec.Check()
}

var notInName = regexp.MustCompile(`[^A-Za-z0-9_.-]+`)

// nameOf turns the last element of a path into a volume name.
func nameOf(device string) string {
	name := notInName.ReplaceAllString(filepath.Base(device), "_")
	return name[:min(len(name), 64)]
}

// parseKeys parses the references and makes the paths in them absolute, since the daemon runs elsewhere.
func parseKeys(texts []string) ([]keyclient.Ref, error) {
	if len(texts) == 0 {
		return nil, cli.UsageError{Err: fmt.Errorf("--key is missing")}
	}
	var refs []keyclient.Ref
	for _, text := range texts {
		ref, err := keyclient.ParseRef(text)
		if err != nil {
			return nil, fmt.Errorf("--key: %w", err)
		}
		if ref.Scheme == keyclient.SchemeFile {
			if ref.Path, err = filepath.Abs(ref.Path); err != nil {
				return nil, err
			}
		}
		refs = append(refs, ref)
	}
	return refs, nil
}

// unlocked is a device of this process whose key was proven.
type unlocked struct {
	device    *blockdev.Device
	volumeKey *secret.Buffer
}

// keySource is where the verbs that need no daemon have their key from.
type keySource struct {
	refs    []string
	timeout time.Duration
}

func (k *keySource) addFlags(flags *pflag.FlagSet) {
	keyFlag(flags, &k.refs)
	flags.DurationVar(&k.timeout, "timeout", 30*time.Second, "for fetching the key")
}

// open opens a device in this process, for the verbs that need no daemon. The caller wipes the key and closes the device.
func (c *command) open(ctx context.Context, spec blockdev.Spec, keys keySource) (*unlocked, error) {
	refs, err := parseKeys(keys.refs)
	if err != nil {
		return nil, err
	}
	file, err := config.Load(c.config)
	if err != nil {
		return nil, err
	}
	clients, err := keyclient.New(file.Config, keyclient.WithStdin(os.Stdin), keyclient.WithAsk(keyclient.Ask))
	if err != nil {
		return nil, err
	}
	defer clients.Close()
	device, err := blockdev.Open(spec, file.Limits())
	if err != nil {
		return nil, err
	}
	attempt := unlock.Attempt{Name: spec.Name, Refs: refs, Keys: clients, Budget: file.Budget(), Timeout: keys.timeout}
	result, err := attempt.Unlock(ctx, device)
	if err != nil {
		device.Close()
		return nil, err
	}
	return &unlocked{device: device, volumeKey: result.VolumeKey.Key}, nil
}
