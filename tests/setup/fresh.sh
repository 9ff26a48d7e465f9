#!/bin/sh
# Run commands in a root that has nothing: a minimal Debian with make, where neither tracefs nor debugfs is mounted.
#
# usage: fresh.sh [-k SETUP] COMMAND ...       (as root)
#
# Each command is run by a shell of its own in a copy of this repository, all of them in one root; exit status 1 if one
# fails. The Debian is made once and kept in the cache; what the commands install there is thrown away afterwards. With
# -k the cache keeps what the command SETUP has made of that Debian, too, until packages.sh or SETUP changes. It
# reaches the network as this machine does: the same resolver, proxies and certificates.
set -eu

release=bookworm
repo=$(cd "$(dirname "$0")/../.." && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/tcp-tracers
base=$cache/minimal-$release.tar
work=/root/tcp-tracers          # in the new root

if [ "${1:-}" = inside ]; then  # in a mount namespace of its own: inside ROOT COMMAND ...
    root=$2
    shift 2
    mount --bind "$root" "$root"        # / has to be a mount, or its propagation cannot be changed
    mount -t proc proc "$root/proc"
    mount -t sysfs sysfs "$root/sys"
    mount --rbind /dev "$root/dev"
    failed=
    for command; do
        echo "fresh.sh: $command"
        # shellcheck disable=SC2046     # one variable a word
        env -i $(env | grep -iE '^(CI|[a-z]+_proxy)=' || true) HOME=/root TERM=dumb \
            PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
            chroot "$root" sh -c "cd $work && $command" </dev/null || failed=yes
    done
    [ -z "$failed" ]
    exit
fi

setup=
if [ "${1:-}" = -k ]; then
    setup=$2
    kept=$cache/kept-$(echo "$setup" | cat - "$repo/tests/setup/packages.sh" | cksum | tr ' ' -).tar
    shift 2
fi
if [ ! -e "$base" ]; then
    mkdir -p "$cache"
    mmdebstrap --quiet --variant=apt --include=make "$release" "$base.part.tar"
    mv "$base.part.tar" "$base"
fi
root=$(mktemp -d)
trap 'rm -rf --one-file-system "$root"' EXIT
trap 'exit 1' INT TERM
from=$base
[ -z "$setup" ] || [ ! -e "$kept" ] || from=$kept setup=
tar -xf "$from" -C "$root"
cp -L /etc/resolv.conf /etc/hosts "$root/etc"
apt-config dump Acquire >"$root/etc/apt/apt.conf.d/99host"
mkdir -p "$root/usr/local/share/ca-certificates" "$root$work"
cp -RT /usr/local/share/ca-certificates "$root/usr/local/share/ca-certificates"
tar -c -C "$repo" --exclude ./.git --exclude ./.venv . | tar -x -C "$root$work"
in_root() {
    unshare --mount --propagation private sh "$0" inside "$root" "$@"
}
if [ -n "$setup" ]; then
    in_root "$setup"
    rm -f "$cache"/kept-*
    tar -cf "$kept.part" -C "$root" --exclude ".$work" .
    mv "$kept.part" "$kept"
fi
in_root "$@"
