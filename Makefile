# make demo      see the tools at work on connections that the demo makes (installs what is missing; as root)
# make test      the tests (installs what is missing; as root)
# make test-load   all tools under full load, with buffers too small for it, and with very many sockets
# make test-kernels   the tools on other kernels, in virtual machines (KERNELS=bookworm: on one)
# make test-fresh    make demo and make test in a Debian where nothing is installed, in a folder (chroot)
# make test-fleet   tcplife and tcpchurn with syslog-ng, ClickHouse, chDB and Prometheus, in a folder (chroot)
# make bench-fleet  what that costs a machine, and the bytes a session takes
# make lint      the static part of the tests
# make same      compare the parts that the tools share (FROM=tcplife: first copy that tool's into the others)
# make bench     what tracing costs, beside the peers (20 minutes); draws docs/overhead.svg
# make soak      all five tools under a mixed load for DURATION seconds (default 1800), checked against its counts
# make install   what the Debian package has, below PREFIX (default /usr/local), DESTDIR before it
# make uninstall   stop the service and remove what make install has installed; /var/log/tcp-tracers stays
# make deb       the Debian package, in build/ (installs what is missing; as root)
# make test-package   the package, built, installed, used and removed on Debian 12 and 13 (as root)
# make test-container   the image of examples/container, built and run by podman, and its pod (as root)
# make version   write the version that CHANGELOG.md has into the tools
# make help      this list

PREFIX  ?= /usr/local
DESTDIR ?=
PYTHON  ?= /usr/bin/python3
TOOLS   = tcplife tcpaccept tcpv4connect tcpchurn deeptcptracer
LIVE    = $(TOOLS:%=test_%) test_hostile test_second test_right test_reports test_sockets test_existing test_owners \
          test_output
LOAD    = load_loss load_many
# Each argument is a command, so that a tool has a line of its own in what prove prints.
PROVE   = PYTHON=$(PYTHON) prove --directives --failures --comments --timer --exec 'sh -c'
DURATION ?= 1800
PACKAGE_RELEASES = bookworm trixie
KERNELS = bullseye bookworm trixie trixie-rt sid trixie-sid bookworm-arm64 trixie-arm64-16k
RUFF    = .venv/bin/ruff
RUFF_VERSION = 0.17.6
CHDB_VERSION = 26.9.0
VALIDATE = .venv/bin/kubernetes-validate
VALIDATE_VERSION = 1.37.0

VERSION := $(shell sed -n 's/^.. \[\([0-9.]*\)\] .*/\1/p' CHANGELOG.md | head -n 1)

ROOT  = $(DESTDIR)$(PREFIX)
SHARE = $(ROOT)/share

help:
	@sed -n 's/^# make/make/p' Makefile | awk -F '  +' '{printf "%-19s %s\n", $$1, $$2}'

demo: deps-demo
	@PYTHON=$(PYTHON) sh tests/setup/demo.sh

test: deps-test $(RUFF)
	@mkdir -p build && rm -f build/retries
	RETRIES=$(CURDIR)/build/retries $(PROVE) tests/static/lint.t tests/unit/unit.t \
	    $(TOOLS:%='tests/live/cli.t %') $(LIVE:%='tests/lib/unittest.t %')

test-load: deps-test
	$(PROVE) $(LOAD:%='tests/lib/unittest.t %')

test-fresh: deps-kernels
	sh tests/setup/fresh.sh 'make demo' 'make test'

test-fleet: deps-kernels
	sh tests/setup/fresh.sh -k 'make deps-fleet' "$(PROVE) 'tests/lib/unittest.t test_fleet'"

bench-fleet: deps-kernels
	sh tests/setup/fresh.sh -k 'make deps-fleet' 'tests/lib/run-python tests/fleet/bench_fleet.py'

test-package: deps-package
	$(PROVE) $(PACKAGE_RELEASES:%='tests/package/package.t %')

test-container: deps-container $(VALIDATE) deb
	$(PROVE) 'tests/lib/unittest.t test_container'

test-kernels: deps-kernels
	sh tests/kernels/kernels.sh $(KERNELS)

lint: deps-test $(RUFF)
	$(PROVE) tests/static/lint.t

same:
	@$(PYTHON) tests/static/same.py $(FROM:%=--copy %.py) $(TOOLS:=.py)

bench: deps-bench
	@mkdir -p build
	PYTHON=$(PYTHON) tests/lib/run-python tests/peers/bench.py | tee build/bench.txt
	$(PYTHON) tests/peers/plot.py docs/overhead.svg <build/bench.txt

soak: deps-test
	PYTHON=$(PYTHON) tests/lib/run-python tests/load/soak.py $(DURATION)

# What each needs, as a test that it is there; packages are only installed if one is not.
have = (for command in $(1); do command -v $$command >/dev/null || exit 1; done)

deps-demo:
	@$(PYTHON) -c 'import bcc' 2>/dev/null && $(call have,ip) || sh tests/setup/packages.sh demo

deps-test: deps-demo
	@$(PYTHON) -c 'import tap, venv, ensurepip' 2>/dev/null && \
	 $(call have,prove shellcheck mandoc col cc bpftool sysctl mount jq nft) || sh tests/setup/packages.sh test

deps-bench: deps-test
	@$(PYTHON) -c 'import matplotlib' 2>/dev/null && $(call have,perf) || sh tests/setup/packages.sh bench

deps-kernels:
	@$(call have,qemu-system-x86_64 qemu-system-aarch64 mmdebstrap busybox cpio modprobe xz zstd) || \
	 sh tests/setup/packages.sh kernels

deps-fleet:
	sh tests/setup/packages.sh fleet
	$(PYTHON) -m venv /opt/chdb
	/opt/chdb/bin/pip --quiet --disable-pip-version-check install --no-deps chdb-core==$(CHDB_VERSION)

deps-deb:
	@$(call have,dh dh_python3 dpkg-buildpackage lintian) || sh tests/setup/packages.sh deb

deps-package:
	@$(PYTHON) -c 'import pexpect, tap' 2>/dev/null && $(call have,mmdebstrap prove systemd-nspawn) || \
	 sh tests/setup/packages.sh package

deps-container:
	@$(PYTHON) -c 'import bcc, tap, venv, ensurepip' 2>/dev/null && \
	 $(call have,podman runc catatonit mmdebstrap prove lsns) || sh tests/setup/packages.sh container

$(RUFF):
	$(PYTHON) -m venv .venv
	.venv/bin/pip --quiet --disable-pip-version-check install ruff==$(RUFF_VERSION)

$(VALIDATE):
	$(PYTHON) -m venv .venv
	.venv/bin/pip --quiet --disable-pip-version-check install kubernetes-validate==$(VALIDATE_VERSION)

tools:
	@echo $(TOOLS)

# For what is installed on this machine, and not below DESTDIR
systemctl = [ -n "$(DESTDIR)" ] || [ ! -d /run/systemd/system ] || systemctl --quiet $(1)

# /etc is where logrotate looks, whatever PREFIX is.
install:
	install -D -t $(SHARE)/tcp-tracers $(TOOLS:=.py) btfheaders.py service/tcplife-log.py
	install -d $(ROOT)/sbin
	for tool in $(TOOLS) btfheaders; do ln -sf ../share/tcp-tracers/$$tool.py $(ROOT)/sbin/$$tool; done
	for page in man/*/*; do \
	    sed 's/^[.]Os$$/& tcp-tracers $(VERSION)/' $$page | install -D -m 644 /dev/stdin $(SHARE)/$$page || exit 1; \
	done
	install -D -m 644 -t $(SHARE)/doc/tcp-tracers README.md CHANGELOG.md SECURITY.md
	install -D -m 644 -t $(SHARE)/doc/tcp-tracers/docs docs/*.md
	install -D -m 644 -t $(SHARE)/doc/tcp-tracers/examples examples/*.txt
	install -D -m 644 -t $(SHARE)/doc/tcp-tracers/examples/fleet examples/fleet/*
	install -D -m 644 -t $(SHARE)/doc/tcp-tracers/examples/container examples/container/*
	install -D -m 644 completion/tcp-tracers.bash $(SHARE)/bash-completion/completions/tcplife
	for tool in $(filter-out tcplife,$(TOOLS)); do ln -sf tcplife $(SHARE)/bash-completion/completions/$$tool; done
	sed 's,=/usr/,=$(PREFIX)/,' service/tcplife.service | \
	    install -D -m 644 /dev/stdin $(ROOT)/lib/systemd/system/tcplife.service
	install -D -m 644 service/tcp-tracers.logrotate $(DESTDIR)/etc/logrotate.d/tcp-tracers
	$(call systemctl,daemon-reload)

# Whatever install installs
uninstall:
	[ ! -e $(ROOT)/lib/systemd/system/tcplife.service ] || { $(call systemctl,disable --now tcplife); }
	list=$$(mktemp -d) && $(MAKE) -s install DESTDIR=$$list && \
	(cd $$list && find . ! -type d -printf '$(DESTDIR)/%P\0') | xargs -0 rm -f && \
	(cd $$list && find . -depth -type d -path '*/tcp-tracers*' -printf '$(DESTDIR)/%P\0') | \
	    xargs -0 rmdir --ignore-fail-on-non-empty && rm -r $$list
	$(call systemctl,daemon-reload)

# In a copy, because debhelper leaves files behind. What it needs is checked here, and a compiler is not. The tag is
# reported because the project has no mail address: see debian/README.source.
deb: deps-deb
	rm -rf build/deb && mkdir -p build/deb/tcp-tracers
	cp -a Makefile *.md LICENSE *.py completion debian docs examples man service build/deb/tcp-tracers
	cd build/deb/tcp-tracers && dpkg-buildpackage --build=binary --no-sign --no-check-builddeps
	lintian --fail-on error,warning --suppress-tags bogus-mail-host build/deb/*.changes
	mv build/deb/*.deb build

version:
	sed -i 's/version="%(prog)s .*"/version="%(prog)s $(VERSION)"/' $(TOOLS:=.py)

.PHONY: help tools demo test test-load test-fresh test-fleet test-package test-container test-kernels lint same bench \
        bench-fleet soak deps-demo deps-test deps-bench deps-fleet deps-package deps-container deps-kernels deps-deb \
        install uninstall deb version
