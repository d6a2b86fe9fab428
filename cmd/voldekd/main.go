// Command voldekd is the host daemon: it reads its configuration, finds again what an earlier process left open, attaches
// the volumes listed there and answers on the control socket.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	sd "github.com/coreos/go-systemd/v22/daemon"

	"voldek/daemon"
	"voldek/daemon/api"
	"voldek/internal/cli"
	"voldek/internal/config"
	"voldek/internal/exit"
	"voldek/internal/secret"
	"voldek/keyclient"
)

// version is set by the build.
var version = "devel"

// stopTimeout is how long FUSE volumes in use may hold up the end; below the unit's TimeoutStopSec.
const stopTimeout = 60 * time.Second

type options struct {
	config, socket     string
	checkConfig, print bool
}

func main() {
	var o options
	flag.StringVar(&o.config, "config", config.DefaultPath, "configuration file")
	flag.StringVar(&o.socket, "socket", api.DefaultSocket, "control socket, where systemd does not pass one")
	flag.BoolVar(&o.checkConfig, "check-config", false, "check the configuration and exit")
	flag.BoolVar(&o.print, "version", false, "print the version and exit")
	flag.CommandLine.Init("voldekd", flag.ContinueOnError)
	if err := flag.CommandLine.Parse(os.Args[1:]); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			os.Exit(int(exit.OK))
		}
		os.Exit(int(exit.Usage))
	}
	os.Exit(int(cli.Report(os.Stderr, run(o), cli.Subject{Help: "man voldek.toml"}, false)))
}

func run(o options) error {
	if o.print {
		_, err := fmt.Println("voldekd", version)
		return err
	}
	file, err := config.Load(o.config)
	if err != nil || o.checkConfig {
		return err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	warning, err := secret.HardenProcess()
	if err != nil {
		return err
	}
	if warning != "" {
		log.Warn(warning)
	}
	// A host daemon idles for months: give memory back early rather than save a few milliseconds of collection.
	debug.SetGCPercent(50)
	return serve(o, file, log)
}

// serve runs the daemon until SIGTERM or SIGINT.
func serve(o options, file *config.File, log *slog.Logger) error {
	keys, err := keyclient.New(file.Config)
	if err != nil {
		return err
	}
	engine, err := daemon.New(daemon.Config{
		Keys: keys, Limits: file.Limits(), Budget: file.Budget(), RunDir: file.Daemon.RunDir,
		Timeout: time.Duration(file.Daemon.AttachTimeout), Log: log,
	})
	if err != nil {
		return err
	}
	rule, err := daemon.GroupRule(file.Daemon.SocketGroup)
	if err != nil {
		return err
	}
	listener, err := listen(o.socket, rule)
	if err != nil {
		return err
	}
	engine.Restore()
	engine.Configure(keys, file.AtBoot())
	server := daemon.NewServer(engine, rule, log)
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	_, _ = sd.SdNotify(false, sd.SdNotifyReady)
	log.Info("ready", "version", version, "socket", listener.Addr().String())

	err = untilSignal(o, engine, served, log)
	_, _ = sd.SdNotify(false, sd.SdNotifyStopping)
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	engine.Stop(ctx)
	return errors.Join(err, server.Close())
}

// untilSignal reloads on SIGHUP, feeds the watchdog while the engine answers, and returns on SIGTERM or SIGINT.
func untilSignal(o options, engine *daemon.Engine, served <-chan error, log *slog.Logger) error {
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGTERM, syscall.SIGINT)
	defer signal.Stop(signals)
	var alive <-chan time.Time
	if interval, err := sd.SdWatchdogEnabled(false); err == nil && interval > 0 {
		ticker := time.NewTicker(interval / 3)
		defer ticker.Stop()
		alive = ticker.C
	}
	for {
		select {
		case err := <-served:
			return err
		case <-alive:
			engine.List() // takes the engine's lock: a stuck engine is not fed
			_, _ = sd.SdNotify(false, sd.SdNotifyWatchdog)
		case s := <-signals:
			if s != syscall.SIGHUP {
				log.Info("stopping", "signal", s.String())
				return nil
			}
			if err := reload(o, engine); err != nil {
				log.Error("reload: the configuration is as before", "error", err)
			}
		}
	}
}

// reload takes key services and listed volumes from the file again; the [daemon] table needs a restart.
func reload(o options, engine *daemon.Engine) error {
	_, _ = sd.SdNotify(false, sd.SdNotifyReloading)
	defer func() { _, _ = sd.SdNotify(false, sd.SdNotifyReady) }()
	file, err := config.Load(o.config)
	if err != nil {
		return err
	}
	keys, err := keyclient.New(file.Config)
	if err != nil {
		return err
	}
	engine.Configure(keys, file.AtBoot())
	return nil
}

// listen takes the socket that systemd passes, or makes its own.
func listen(path string, rule daemon.PeerRule) (net.Listener, error) {
	passed, err := activation.Listeners()
	if err != nil {
		return nil, err
	}
	if len(passed) > 0 {
		return passed[0], nil
	}
	return daemon.Listen(path, rule)
}
