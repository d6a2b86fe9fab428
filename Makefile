# voldek. The two commands to know:  make demo   make test
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build

GO ?= go
export CGO_ENABLED := 0
VERSION := $(shell git describe --always --dirty 2>/dev/null || echo devel)
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOVULNCHECK := golang.org/x/vuln/cmd/govulncheck@v1.8.0
FUZZTIME ?= 1m
SOURCES := $(shell find . -name '*.go' -not -path './.git/*') go.mod go.sum

.PHONY: build demo demo-openstack check test bench fuzz vuln man clean
build: bin/voldek bin/voldekd  ## the binaries, static, into bin/

bin/%: $(SOURCES)
	$(GO) build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o $@ ./cmd/$*

demo: build  ## open a real LUKS2 volume with a key from the embedded cluster-kms
	demo/packages.sh demo
	demo/demo.sh

demo-openstack: build  ## the same with a real Keystone and Barbican on loopback
	demo/packages.sh openstack
	demo/openstack.sh

check:  ## fast: vet, staticcheck, unit tests, arrows; no root
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { echo "not gofmt-ed:"; gofmt -l $$(git ls-files '*.go'); exit 1; }
	$(GO) vet ./...
	GOARCH=386 $(GO) vet ./blockdev/luks ./blockdev/xts ./blockdev/dm ./keyclient/...
	GOARCH=arm64 $(GO) build ./...
	$(GO) run $(STATICCHECK) ./...
	$(GO) test -short ./...

test: check  ## everything: real servers, FUSE, VM boots; installs what it needs
	demo/packages.sh test
	demo/as-root.sh env PATH="$$PATH" HOME="$$HOME" $(GO) test -timeout 20m -p 1 ./...

bench: build  ## figures against the peers, in one run, into bench/results/
	demo/packages.sh test
	demo/as-root.sh env PATH="$$PATH" HOME="$$HOME" $(GO) run ./bench -o bench/results

fuzz:  ## each fuzz target for FUZZTIME
	@for pkg in $$($(GO) list ./...); do \
	  for target in $$($(GO) test -list '^Fuzz' $$pkg | grep '^Fuzz' || true); do \
	    echo "== $$pkg $$target"; $(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 1x $$pkg; \
	  done; \
	done

vuln:  ## known vulnerabilities; needs the Go vulnerability database
	$(GO) run $(GOVULNCHECK) ./...

clean:
	rm -rf bin
