#!/bin/sh
# The tools on other kernels: Debian releases, each with its own kernel, bcc and Python, booted in qemu.
#
# usage: kernels.sh NAME ...
#
# NAME is a release (bookworm), with Debian's name of a kernel for another architecture (trixie-arm64-16k), with rt for
# its PREEMPT_RT kernel (trixie-rt), or with the release that the kernel is from (trixie-sid). It is unpacked once, into
# a folder of the cache, and mounted read-only in the guest, with this repository beside it. There all_tools.py runs.
# All is emulated: no /dev/kvm is needed, and times mean nothing. MODES chooses among all_tools.py's; without
# it, peers.py runs as well. The tables and what was wrong are printed once more at the end.
set -eu

repo=$(cd "$(dirname "$0")/../.." && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/tcp-tracers
limit=1500              # seconds a guest may take

# Nothing of the release runs on this machine, so it may be of any architecture.
install_release() {     # install_release NAME RELEASE KERNEL [ARCHITECTURE]
    mmdebstrap --quiet --mode=root --variant=extract --architectures="${4:-${3%%-*}}" \
        --include='?priority(required)' \
        --include="python3-bpfcc,bpfcc-tools,iproute2,procps,kmod,busybox-static,linux-image-$3,linux-headers-$3" \
        --aptopt='Acquire::Check-Valid-Until "false"' "$2" "$cache/$1.part"     # sid's index may be older than it says
    mkdir "$cache/$1.part/mnt"
    depmod -b "$cache/$1.part" "$(basename "$cache/$1.part"/lib/modules/*)"
}

exchange_kernel() {     # exchange_kernel NAME RELEASE OTHER: both as hard links
    make_root "$2"
    make_root "$3"
    cp -al "$cache/$2" "$cache/$1.part"
    for folder in lib/modules usr/src; do
        rm -r "${cache:?}/$1.part/$folder"
        cp -al "$cache/$3/$folder" "$cache/$1.part/$folder"
    done
}

make_root() {           # make_root NAME: a folder of the cache, unless it is there
    [ ! -e "$cache/$1/sbin/sysctl" ] || return 0        # else it is from an older version of this script
    echo "kernels.sh: installing $1" >&2
    rm -rf "${cache:?}/$1" "$cache/$1.part"
    mkdir -p "$cache"
    case $1 in
    *-sid) exchange_kernel "$1" "${1%-sid}" sid ;;
    *-rt) install_release "$1" "${1%-rt}" rt-amd64 amd64 ;;
    *-*) install_release "$1" "${1%%-*}" "${1#*-}" ;;
    *) install_release "$1" "$1" amd64 ;;
    esac
    mv "$cache/$1.part" "$cache/$1"
}

unpack() {              # unpack MODULE FOLDER: the path of the plain module in the folder
    plain=$2/$(basename "$1" | sed 's/[.]ko[.].*/.ko/')
    case $1 in
    *.xz) xz -dc "$1" ;;
    *.zst) zstd -qdc "$1" ;;
    *) cat "$1" ;;
    esac >"$plain"
}

make_initrd() {         # make_initrd ROOT VERSION FOLDER: mounts the two folders and starts guest() below
    mkdir -p "$3/bin" "$3/proc" "$3/root"
    cp "$1/bin/busybox" "$3/bin"
    {
        echo '#!/bin/busybox sh'
        for module in virtio_pci 9pnet_virtio 9p; do
            modprobe -d "$1" -S "$2" --show-depends "$module"
        done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' >"$tmp/modules"
        while read -r module; do
            unpack "$module" "$3"
            echo "/bin/busybox insmod /${plain##*/}"
        done <"$tmp/modules"
        how=trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro
        echo "/bin/busybox mount -t 9p -o $how root /root"
        echo "/bin/busybox mount -t 9p -o $how repo /root/mnt"
        echo 'exec /bin/busybox switch_root /root /bin/sh /mnt/tests/kernels/kernels.sh guest'
    } >"$3/init"
    chmod +x "$3/init"
    (cd "$3" && find . | cpio --quiet -o -H newc | gzip -1)
}

boot() {                # boot NAME: its output on stdout, and in a file; fails if all_tools.py does
    root=$cache/$1
    version=$(basename "$root"/lib/modules/*)
    kernel=$root/lib/modules/$version/vmlinuz
    [ -e "$kernel" ] || kernel=$root/boot/vmlinuz-$version      # up to trixie
    case $1 in          # on arm64 "max" takes four times as long, to authenticate pointers
    *-arm64) machine='aarch64 -M virt -cpu cortex-a72' console=ttyAMA0 ;;
    *-arm64-16k) machine='aarch64 -M virt -cpu neoverse-n1' console=ttyAMA0 ;;      # the other has no such pages
    *) machine='x86_64 -cpu max' console=ttyS0 ;;
    esac
    make_initrd "$root" "$version" "$tmp/$1" >"$tmp/$1.initrd"
    for _ in 1 2 3; do
        rm -f "$tmp/$1.out"
        watch "$1" >&2 &
        watcher=$!
        # shellcheck disable=SC2086     # a list
        timeout "$limit" qemu-system-$machine -accel tcg,thread=multi -smp 2 -m 4096 -nographic -no-reboot \
            -kernel "$kernel" -initrd "$tmp/$1.initrd" -pidfile "$tmp/$1.pid" \
            -append "console=$console panic=-1 quiet modes=$(echo "${MODES:-}" | tr ' ' ,)" \
            -fsdev "local,id=root,path=$root,security_model=passthrough,readonly=on" \
            -device virtio-9p-pci,fsdev=root,mount_tag=root \
            -fsdev "local,id=repo,path=$repo,security_model=passthrough,readonly=on" \
            -device virtio-9p-pci,fsdev=repo,mount_tag=repo </dev/null | sed -u 's,\r,,g' | tee "$tmp/$1.out" |
            sed -un 's/.*\(guest: started\)/\1/; /^guest: started/,/^guest: exit/p'       # the firmware paints before
        kill $watcher 2>/dev/null || true
        is_emulators_fault "$1" || break
        echo "kernels.sh: the emulator has broken $1: once more" >&2
    done
    grep -q '^guest: exit status 0' "$tmp/$1.out"
}

watch() {               # watch NAME: ends a guest that has not got as far as guest() in two minutes
    for _ in $(seq 120); do
        sleep 1
        ! grep -qs 'guest: started' "$tmp/$1.out" || return 0
    done
    kill "$(cat "$tmp/$1.pid")"
}

# QEMU 7.2 with two CPUs sometimes runs into a breakpoint that the kernel has already taken out of its code again. That
# kills what runs there ("qemu-x86_64 booting with 8.0.0 stil see int3", linux-kernel, July 2023).
is_emulators_fault() {
    ! grep -q 'guest: started' "$tmp/$1.out" || grep -q 'int3: 0000' "$tmp/$1.out"
}

guest() {               # in the guest, as its first process
    mount -t proc proc /proc
    mount -t sysfs sysfs /sys
    mount -t devtmpfs devtmpfs /dev
    mount -t tmpfs tmpfs /tmp
    mount -t tmpfs tmpfs /run
    mount -t tracefs tracefs /sys/kernel/tracing
    mount -t debugfs debugfs /sys/kernel/debug
    mount -t securityfs securityfs /sys/kernel/security
    ip link set lo up
    echo "guest: started $(uname -r)"
    cd /mnt/tests/kernels
    PYTHONPATH=/mnt$(printf ':%s' /mnt/tests/*/)
    export PYTHONPATH PYTHONPYCACHEPREFIX=/tmp/pycache SLOW=8 CLOCK_MAY_BE_SET=yes HOME=/tmp LANG=C
    modes=$(sed -n 's/.*modes=\([^ ]*\).*/\1/p' /proc/cmdline | tr , ' ')
    status=0
    # shellcheck disable=SC2086     # a list
    python3 -W ignore all_tools.py $modes || status=$?
    if [ -z "$modes" ]; then
        python3 -W ignore ../peers/peers.py || status=$?
        python3 -W ignore all_tools.py lockdown || status=$?
    fi
    echo "guest: exit status $status"
    echo o >/proc/sysrq-trigger
    while :; do :; done
}

if [ "$1" = guest ]; then
    guest
fi
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
failed=
for name; do
    make_root "$name"
    boot "$name" || failed="$failed $name"
done
for table in result 'wrong owner'; do       # by their headings
    echo
    for name; do
        cat "$tmp/$name.out"
    done | awk -v table="$table" '
        /^kernel / { wanted = $0 ~ table "$"; if (!wanted || shown++) next }
        wanted && /^(kernel|[0-9]+[.][0-9]+[.])/'
done
for name in $failed; do                     # and why
    echo "kernels.sh: $name failed:" >&2
    grep '^wrong: ' "$tmp/$name.out" >&2 || tail -n 20 "$tmp/$name.out" >&2
done
[ -z "$failed" ]
