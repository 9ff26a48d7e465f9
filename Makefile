# make demo      see the tools at work on connections of their own (installs what is missing; as root)
# make test      all tests (installs what is missing; as root)
# make test-kernels   the tools on other kernels, in virtual machines (KERNELS=bookworm: on one)
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
TESTS   = tests/lint.t tests/unit.t tests/cli.t tests/live.t
DURATION ?= 1800
KERNELS = bullseye bookworm trixie sid
RUFF    = .venv/bin/ruff
RUFF_VERSION = 0.17.6

SBIN = $(DESTDIR)$(PREFIX)/sbin
MAN8 = $(DESTDIR)$(PREFIX)/share/man/man8
DOC  = $(DESTDIR)$(PREFIX)/share/doc/tcp-tracers/examples

help:
	@sed -n 's/^# make/make/p' Makefile

demo: deps-demo
	@PYTHON=$(PYTHON) sh tests/demo.sh

test: deps-test $(RUFF)
	PYTHON=$(PYTHON) prove --directives --failures --comments $(TESTS)

test-kernels: deps-kernels
	sh tests/kernels.sh $(KERNELS)

lint: deps-test $(RUFF)
	PYTHON=$(PYTHON) prove --directives --failures --comments tests/lint.t

bench: deps-test
	$(PYTHON) tests/bench.py

soak: deps-test
	cd tests && PYTHONPATH=..:. PYTHONDONTWRITEBYTECODE=1 $(PYTHON) -W ignore soak.py $(DURATION)

# What each needs, as a test that it is there; packages are only installed if one is not.
deps-demo:
	@$(PYTHON) -c 'import bcc' 2>/dev/null && command -v ip >/dev/null || sh tests/packages.sh demo

deps-test: deps-demo
	@$(PYTHON) -c 'import tap, venv, ensurepip' 2>/dev/null && command -v prove >/dev/null && \
	 command -v shellcheck >/dev/null && command -v mandoc >/dev/null && command -v cc >/dev/null && \
	 command -v col >/dev/null && command -v bpftool >/dev/null || sh tests/packages.sh test

deps-kernels:
	@command -v qemu-system-x86_64 >/dev/null && command -v mmdebstrap >/dev/null && command -v busybox >/dev/null && \
	 command -v cpio >/dev/null && command -v modprobe >/dev/null && command -v xz >/dev/null && \
	 command -v zstd >/dev/null || sh tests/packages.sh kernels

$(RUFF):
	$(PYTHON) -m venv .venv
	.venv/bin/pip --quiet --disable-pip-version-check install ruff==$(RUFF_VERSION)

tools:
	@echo $(TOOLS)

install:
	install -d $(SBIN) $(MAN8) $(DOC)
	for tool in $(TOOLS); do \
	    install -m 755 $$tool.py $(SBIN)/$$tool && install -m 644 man/man8/$$tool.8 $(MAN8) && \
	    install -m 644 examples/$${tool}_example.txt $(DOC) || exit 1; \
	done
	install -m 755 btfheaders.py $(SBIN)

uninstall:
	for tool in $(TOOLS); do \
	    rm -f $(SBIN)/$$tool $(MAN8)/$$tool.8 $(DOC)/$${tool}_example.txt; \
	done
	rm -f $(SBIN)/btfheaders.py
	-rmdir $(DOC) $(dir $(DOC)) 2>/dev/null

.PHONY: help tools demo test test-kernels lint bench soak deps-demo deps-test deps-kernels install uninstall
