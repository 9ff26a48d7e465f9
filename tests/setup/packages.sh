#!/bin/sh
# Install what the demo or the tests need, with the system's package manager.
#
# usage: packages.sh demo|test|bench|fleet|kernels|deb|package|container
# shellcheck disable=SC2086     # lists of packages are meant to be split
set -eu

install() {     # install COMMAND... with the packages of the chosen kind
    case $kind in
    demo) list=$demo ;;
    test) list="$demo $test" ;;
    bench) list=${bench:?the peers come from Debian: not known how to get them here} ;;
    fleet) list="$demo $test ${fleet:?the parts come from Debian: not known how to get them here}" ;;
    kernels) list=${kernels:?the kernels come from Debian: not known how to get mmdebstrap here} ;;
    deb) list=${deb:?a Debian package is built on Debian or Ubuntu} ;;
    package) list=${package:?the package is tested in Debian: not known how to get mmdebstrap here} ;;
    container) list="$demo ${container:?the image is made of a Debian package: not known how to build that here}" ;;
    esac
    echo "packages.sh: installing $list" >&2
    "$@" $list >/dev/null
}

# patiently COMMAND...: again for ten minutes while another program holds a lock of apt's, as unattended-upgrades does
# on a new machine. DPkg::Lock::Timeout is not enough: it does not cover the lock of the lists.
patiently() {
    for _ in $(seq 120); do
        said=$(LC_ALL=C "$@" 2>&1 >/dev/null) && status=0 || status=$?
        case $said in
        *'Could not get lock'*) echo "packages.sh: waiting for another program that installs packages" >&2 ;;
        *) break ;;
        esac
        sleep 5
    done
    [ -z "$said" ] || echo "$said" >&2
    return $status
}

kind=${1:?}
if command -v apt-get >/dev/null; then
    demo='python3-bpfcc iproute2'
    test='python3-tap python3-venv perl shellcheck mandoc gcc libc6-dev procps bsdextrautils bpftool mount jq nftables'
    bench='python3-matplotlib bpfcc-tools libbpf-tools linux-perf'
    fleet='syslog-ng-core syslog-ng-mod-http clickhouse-server clickhouse-client prometheus prometheus-node-exporter'
    fleet="$fleet tzdata"
    kernels='qemu-system-x86 qemu-system-arm mmdebstrap busybox-static cpio kmod xz-utils zstd'
    deb='debhelper dh-python dpkg-dev lintian'
    package='python3-tap python3-pexpect perl mmdebstrap systemd-container iproute2'
    container='podman runc catatonit mmdebstrap python3-tap python3-venv perl util-linux'
    export DEBIAN_FRONTEND=noninteractive
    patiently apt-get update -qq
    install patiently apt-get install -y -qq --no-install-recommends
elif command -v dnf >/dev/null; then
    demo='python3-bcc iproute'
    test='perl-Test-Harness ShellCheck mandoc gcc glibc-devel procps-ng util-linux bpftool jq nftables python3-pip'
    install dnf install -y -q
    [ "$kind" != test ] || python3 -m pip install -q tap.py
elif command -v pacman >/dev/null; then
    demo='python-bcc iproute2'
    test='perl shellcheck mandoc gcc procps-ng util-linux bpf jq nftables python-pip'
    install pacman -S --needed --noconfirm --quiet
    [ "$kind" != test ] || python3 -m pip install -q --break-system-packages tap.py
elif command -v zypper >/dev/null; then
    demo='python3-bcc iproute2'
    test='perl ShellCheck mandoc gcc glibc-devel procps util-linux bpftool jq nftables python3-pip'
    install zypper --quiet --non-interactive install
    [ "$kind" != test ] || python3 -m pip install -q tap.py
else
    echo "packages.sh: no package manager known here; install bcc for Python, and see this file for the rest" >&2
    exit 1
fi
