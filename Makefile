# make demo      see the tools at work on connections of their own (installs what is missing; as root)
# make test      the tests (installs what is missing; as root)
# make test-load   all tools under full load, with buffers too small for it, and with very many sockets
# make test-kernels   the tools on other kernels, in virtual machines (KERNELS=bookworm: on one)
# make test-fresh    make demo and make test in a Debian where nothing is installed, in a folder (chroot)
# make test-fleet   tcplife and tcpchurn with syslog-ng, ClickHouse, chDB and Prometheus, in a folder (chroot)
# make bench-fleet  what that costs a machine, and the bytes a session takes
# make lint      the static part of the tests
# make bench     what tracing costs, beside the load untraced and beside the peers that are installed
# make soak      all five tools under a mixed load for DURATION seconds (default 1800), checked against its counts
# make install   tools, man pages and examples below PREFIX (default /usr/local), DESTDIR before it
# make uninstall
# make help

PREFIX  ?= /usr/local
DESTDIR ?=
PYTHON  ?= /usr/bin/python3
TOOLS   = tcplife tcpaccept tcpv4connect tcpchurn deeptcptracer
LIVE    = $(TOOLS:%=test_%) test_hostile test_second test_right test_old_kernels
LOAD    = load_loss load_many
# Each argument is a command, so that a tool has a line of its own in what prove prints.
PROVE   = PYTHON=$(PYTHON) prove --directives --failures --comments --timer --exec 'sh -c'
DURATION ?= 1800
KERNELS = bullseye bookworm trixie sid trixie-sid bookworm-arm64 trixie-arm64-16k
RUFF    = .venv/bin/ruff
RUFF_VERSION = 0.17.6
CHDB_VERSION = 26.9.0

SBIN = $(DESTDIR)$(PREFIX)/sbin
MAN7 = $(DESTDIR)$(PREFIX)/share/man/man7
MAN8 = $(DESTDIR)$(PREFIX)/share/man/man8
DOC  = $(DESTDIR)$(PREFIX)/share/doc/tcp-tracers/examples

help:
	@sed -n 's/^# make/make/p' Makefile

demo: deps-demo
	@PYTHON=$(PYTHON) sh tests/setup/demo.sh

test: deps-test $(RUFF)
	$(PROVE) tests/static/lint.t tests/unit/unit.t $(TOOLS:%='tests/live/cli.t %') $(LIVE:%='tests/live/live.t %')

test-load: deps-test
	$(PROVE) $(LOAD:%='tests/live/live.t %')

test-fresh: deps-kernels
	sh tests/setup/fresh.sh 'make demo' 'make test'

test-fleet: deps-kernels
	sh tests/setup/fresh.sh -k 'make deps-fleet' "$(PROVE) 'tests/live/live.t test_fleet'"

bench-fleet: deps-kernels
	sh tests/setup/fresh.sh -k 'make deps-fleet' 'tests/lib/python tests/fleet/bench_fleet.py'

test-kernels: deps-kernels
	sh tests/kernels/kernels.sh $(KERNELS)

lint: deps-test $(RUFF)
	$(PROVE) tests/static/lint.t

bench: deps-test
	PYTHON=$(PYTHON) tests/lib/python tests/peers/bench.py

soak: deps-test
	PYTHON=$(PYTHON) tests/lib/python tests/load/soak.py $(DURATION)

# What each needs, as a test that it is there; packages are only installed if one is not.
have = (for command in $(1); do command -v $$command >/dev/null || exit 1; done)

deps-demo:
	@$(PYTHON) -c 'import bcc' 2>/dev/null && $(call have,ip) || sh tests/setup/packages.sh demo

deps-test: deps-demo
	@$(PYTHON) -c 'import tap, venv, ensurepip' 2>/dev/null && \
	 $(call have,prove shellcheck mandoc col cc bpftool sysctl mount jq) || sh tests/setup/packages.sh test

deps-kernels:
	@$(call have,qemu-system-x86_64 qemu-system-aarch64 mmdebstrap busybox cpio modprobe xz zstd) || \
	 sh tests/setup/packages.sh kernels

deps-fleet:
	sh tests/setup/packages.sh fleet
	$(PYTHON) -m venv /opt/chdb
	/opt/chdb/bin/pip --quiet --disable-pip-version-check install --no-deps chdb-core==$(CHDB_VERSION)

$(RUFF):
	$(PYTHON) -m venv .venv
	.venv/bin/pip --quiet --disable-pip-version-check install ruff==$(RUFF_VERSION)

tools:
	@echo $(TOOLS)

install:
	install -d $(SBIN) $(MAN7) $(MAN8) $(DOC)
	for tool in $(TOOLS); do \
	    install -m 755 $$tool.py $(SBIN)/$$tool && install -m 644 man/man8/$$tool.8 $(MAN8) && \
	    install -m 644 examples/$${tool}_example.txt $(DOC) || exit 1; \
	done
	install -m 755 btfheaders.py $(SBIN)
	install -m 644 man/man8/btfheaders.8 $(MAN8)
	install -m 644 man/man7/tcp-tracers.7 $(MAN7)
	install -d $(DOC)/fleet
	install -m 644 examples/fleet_example.txt $(DOC)
	install -m 644 examples/fleet/* $(DOC)/fleet

uninstall:
	for tool in $(TOOLS); do \
	    rm -f $(SBIN)/$$tool $(MAN8)/$$tool.8 $(DOC)/$${tool}_example.txt; \
	done
	rm -f $(SBIN)/btfheaders.py $(MAN8)/btfheaders.8 $(MAN7)/tcp-tracers.7
	rm -f $(DOC)/fleet_example.txt $(DOC)/fleet/*
	-rmdir $(DOC)/fleet $(DOC) $(dir $(DOC)) 2>/dev/null

.PHONY: help tools demo test test-load test-fresh test-kernels test-fleet lint bench bench-fleet soak deps-demo \
        deps-test deps-kernels deps-fleet install uninstall
