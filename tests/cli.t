#!/bin/sh
# The tools as commands: arguments, failures, signals, surroundings.
# shellcheck source=tests/tap.sh disable=SC2016,SC2145,SC2312
. "$(dirname "$0")/tap.sh"

# exits STATUS PATTERN COMMAND...: that exit status, and all of stderr is one line that matches (or argparse's usage)
exits() {
    status=$1 pattern=$2
    shift 2
    timeout 60 "$@" >"$tmp/out" 2>"$tmp/err"
    got=$?
    cat "$tmp/err"
    [ "$got" = "$status" ] || { echo "exit status $got"; return 1; }
    ! grep -q Traceback "$tmp/err" || return 1
    if [ -z "$pattern" ]; then
        [ ! -s "$tmp/err" ]
    else
        grep -qE -- "$pattern" "$tmp/err" && { [ "$status" = 2 ] || [ "$(wc -l <"$tmp/err")" = 1 ]; }
    fi
}

full_disk() {
    exits 1 'No space left' sh -c './$0 "$@" --duration 3 >/dev/full' "$@"
}

closed_pipe() {
    exits 0 '' timeout 20 bash -c './$0 "$@" | head -n 1 >/dev/null; exit ${PIPESTATUS[0]}' "$@"
}

closed_stdout() {
    exits 1 'closed' sh -c './$0 "$@" >&-' "$@"
}

no_bcc() {
    mkdir -p "$tmp/none" && echo 'raise ImportError' >"$tmp/none/bcc.py"
    exits 1 'bcc' env PYTHONPATH="$tmp/none" "./$@"
}

unprivileged() {
    cp ./*.py "$tmp" && chmod 755 "$tmp"
    tool=$1
    shift
    exits 1 'needs root' setpriv --reuid 65534 --regid 65534 --clear-groups "$python" "$tmp/$tool.py" "$@"
}

alone() {
    tool=$1
    shift
    mkdir -p "$tmp/alone" && cp "$tool.py" "$tmp/alone"
    if [ -e "/lib/modules/$(uname -r)/build" ]; then
        exits 0 '' "$tmp/alone/$tool.py" --duration 0.3 "$@"
    else
        exits 1 'linux-headers' "$tmp/alone/$tool.py" --duration 0.3 "$@"
    fi
}

# A signal at any moment once Python itself has started: quiet, status 0, and nothing is left
signalled() {
    signal=$1
    shift
    in_kernel >"$tmp/before"
    for delay in 0 0.03 0.06 0.1 0.15 0.2 0.3 0.5; do
        "./$@" >"$tmp/out" 2>"$tmp/err" &
        pid=$!
        until grep -q '^SigBlk:.*4002$' "/proc/$pid/status"; do
            sleep 0.01
            [ -d "/proc/$pid" ] || return 1
        done
        sleep $delay
        kill -s "$signal" $pid
        wait $pid || { echo "status $?, signal after $delay s"; return 1; }
        ! grep . "$tmp/err" || return 1
    done
    nothing_left
}

killed() {
    in_kernel >"$tmp/before"
    for delay in 0.05 0.1 0.15 0.2 0.3 0.5; do
        timeout -s KILL $delay "./$@" >/dev/null 2>&1
    done
    nothing_left
}

# Programs and maps of other tools on this machine are not ours.
in_kernel() {
    {
        { bpftool prog show && bpftool map show; } | sed -n 's/^\([0-9]*\): .* name \([a-z_]*\).*/\1 \2/p'
        cat /sys/kernel/debug/tracing/kprobe_events 2>/dev/null
    } | sort
}

nothing_left() {
    sleep 0.5
    in_kernel >"$tmp/after"
    ! ls -d /tmp/btfheaders-* 2>/dev/null && ! comm -13 "$tmp/before" "$tmp/after" | grep .
}

no_tracefs() {
    exits 0 '' unshare --mount sh -c 'umount -a -t tracefs,debugfs; "$0" "$@" --duration 0.3' "./$@"
}

# What accept() is seen by lies in tracefs, which is root's.
few_capabilities() {
    cp ./*.py "$tmp" && chmod 755 "$tmp"
    tool=$1 caps=-all,+bpf,+perfmon
    shift
    [ "$tool" = tcpv4connect ] || caps=$caps,+dac_read_search
    [ "$tool" != tcpchurn ] || caps=$caps,+sys_ptrace
    exits 0 '' setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps "$caps" --ambient-caps "$caps" \
        --bounding-set "$caps" "$python" "$tmp/$tool.py" --duration 0.3 "$@"
}

deleted_namespace() {
    ip netns add tcpt-gone || return 1
    (sleep 1.5; ip netns del tcpt-gone) &
    exits 0 '' "./$@" --netns tcpt-gone --duration 2
}

ten_at_once() {
    tool=$1 pids=
    shift
    for n in 0 1 2 3 4 5 6 7 8 9; do
        exits 0 '' "./$tool" "$@" --duration 4 >"$tmp/many$n" 2>&1 &
        pids="$pids $!"
    done
    for pid in $pids; do
        wait "$pid" || { cat "$tmp"/many*; return 1; }
    done
}

installs() {
    make -s install DESTDIR="$tmp/dest" PREFIX=/usr || return 1
    tool=$1
    shift
    "$tmp/dest/usr/sbin/$tool" --duration 0.3 "$@" &&
        test -s "$tmp/dest/usr/share/man/man8/$tool.8" && make -s uninstall DESTDIR="$tmp/dest" PREFIX=/usr &&
        [ -z "$(find "$tmp/dest" -type f)" ]
}

if [ -r /sys/kernel/btf/vmlinux ] && [ "$(id -u)" = 0 ]; then
    traces=yes
else
    traces=
fi

for tool in $(make -s tools); do
    set --
    [ "$tool" = tcpchurn ] && set -- $$
    check "$tool --help" exits 0 '' "./$tool" --help
    while read -r wrong; do
        # shellcheck disable=SC2086
        check "$tool $wrong" exits 2 '^usage: ' "./$tool" $wrong
    done <<EOF
$(grep -v '^#' "tests/wrong_$tool.txt")
EOF
    check "$tool without bcc" no_bcc "$tool" "$@"
    check "$tool for nobody" unprivileged "$tool" "$@"
    if [ -z "$traces" ]; then
        skip "$tool traces" "needs root and a kernel with BTF"
        continue
    fi
    check "$tool --duration" exits 0 '' "./$tool" --duration 0.3 "$@"
    check "$tool by its symlink from elsewhere" exits 0 '' env -C / "$PWD/$tool" --duration 0.3 "$@"
    check "$tool alone" alone "$tool" "$@"
    check "$tool >/dev/full" full_disk "$tool" "$@"
    check "$tool | head -n 1" closed_pipe "$tool" "$@"
    check "$tool >&-" closed_stdout "$tool" "$@"
    check "$tool and Ctrl-C" signalled INT "$tool" "$@"
    check "$tool and SIGTERM" signalled TERM "$tool" "$@"
    check "$tool and kill -9" killed "$tool" "$@"
    check "$tool, ten at once" ten_at_once "$tool" "$@"
    check "$tool where tracefs is not mounted" no_tracefs "$tool" "$@"
    check "$tool without root, with some capabilities" few_capabilities "$tool" "$@"
    check "$tool for a namespace that is deleted" deleted_namespace "$tool" "$@"
    for locale in C C.UTF-8; do
        check "$tool in the locale $locale" exits 0 '' env -u LANG LC_ALL=$locale "./$tool" --duration 0.3 "$@"
    done
    check "$tool in 40 columns" exits 0 '' env COLUMNS=40 "./$tool" --duration 0.3 "$@"
    check "$tool installed" installs "$tool" "$@"
done
plan
