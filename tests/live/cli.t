#!/bin/sh
# The tools as commands: failures, signals, surroundings. What they refuse as arguments: unit_arguments.py.
#
# usage: cli.t [TOOL ...]
# shellcheck source=tests/lib/tap.sh disable=SC2016,SC2031,SC2145,SC2312
. "$(dirname "$0")/../lib/tap.sh"

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

no_reader() {           # of what comes before any tracing
    mkfifo "$tmp/fifo"
    exits 0 '' sh -c 'exec 3<>"$tmp/fifo" 4>"$tmp/fifo" 3<&-; exec "./$@" >&4' sh "$@"
}

prints_program() {      # with its flags
    exits 0 '' "./$@" && head -n 1 "$tmp/out" | grep '^/[*] -g0 -D.* [*]/$' && grep '^int tracepoint_' "$tmp/out"
}

no_tree() {
    exits 1 'no kernel headers in BCC_KERNEL_SOURCE (.*)$' env BCC_KERNEL_SOURCE=/nonexistent "./$@" &&
        [ ! -s "$tmp/out" ]
}

no_proc() {
    exits 1 "^$1: " unshare --mount sh -c 'umount -l /proc && exec "./$@"' sh "$@"
}

no_bcc() {
    mkdir "$tmp/none" && echo 'raise ImportError' >"$tmp/none/bcc.py"
    exits 1 'bcc' env PYTHONPATH="$tmp/none" "./$@"
}

unprivileged() {
    cp ./*.py "$tmp"
    tool=$1
    shift
    exits 1 'needs root' setpriv --reuid 65534 --regid 65534 --clear-groups "$python" "$tmp/$tool.py" "$@"
}

alone() {       # it is any bcc program then: where there are no headers, libbcc may say so at length
    tool=$1
    shift
    cp "$tool.py" "$tmp"
    if [ -e "/lib/modules/$(uname -r)/build" ]; then
        exits 0 '' "$tmp/$tool.py" --duration 0.3 "$@"
    else
        "$tmp/$tool.py" --duration 0.3 "$@" >"$tmp/out" 2>&1
        [ $? = 1 ] && grep "^$tool: " "$tmp/out" && ! grep Traceback "$tmp/out"
    fi
}

# signalled STATUS SIGNAL TOOL...: a signal at any moment once Python itself has started: quiet, and nothing is left
signalled() {
    status=$1 signal=$2
    shift 2
    mkdir "$tmp/empty"
    orphans "$1" >"$tmp/before"
    runs=
    for delay in 0 0.1 0.2 0.3 0.5 0.7 1 1.5; do
        signal_after $delay "$@" &
        runs="$runs $!"
    done
    for run in $runs; do
        wait "$run" || failed=yes
    done
    [ -z "${failed:-}" ] && nothing_left "$1"
}

signal_after() {        # signal_after DELAY TOOL...
    delay=$1
    shift
    TMPDIR=$tmp/empty env --default-signal "./$@" >/dev/null 2>"$tmp/err.$delay" &      # in a job, SIGINT is ignored
    pid=$!
    echo $pid >>"$tmp/pids"
    until grep -q '^SigBlk:.*6007$' "/proc/$pid/status"; do     # SIGHUP, SIGINT, SIGQUIT, SIGALRM and SIGTERM
        sleep 0.01
        [ -d "/proc/$pid" ] || return 1
    done
    sleep "$delay"
    kill -s "$signal" $pid
    wait $pid
    got=$?
    echo "status $got, signal after $delay s"
    [ $got = "$status" ] && ! grep . "$tmp/err.$delay"
}

# Programs, maps and kprobes of this tool that no process holds. Those of other programs on this machine are not ours.
orphans() {
    for kind in prog map; do
        bpftool $kind show | sed -n "s/^\([0-9]*\): .* name \([a-z_]*\).*/$kind \1 \2/p"
    done >"$tmp/objects"
    grep -hs '_id:' /proc/[0-9]*/fdinfo/* | sed -n 's/_id:\t/ /p' | sort -u >"$tmp/held"
    while read -r kind id name; do
        grep -q "$name" "$1.py" && ! grep -qx "$kind $id" "$tmp/held" && echo "$kind $id $name"
    done <"$tmp/objects" | sort
    [ ! -e "$tmp/pids" ] ||
        cat /sys/kernel/tracing/kprobe_events /sys/kernel/debug/tracing/kprobe_events 2>/dev/null |
        grep -E "_bcc_($(paste -sd '|' "$tmp/pids"))\b"
}

nothing_left() {
    rmdir "$tmp/empty" || return 1
    orphans "$1" | comm -13 "$tmp/before" - >"$tmp/left"
    for _ in $(seq 20); do              # the kernel frees what a process held some time after its end
        [ -s "$tmp/left" ] || return 0
        sleep 0.5
        orphans "$1" | comm -12 "$tmp/left" - >"$tmp/still"
        mv "$tmp/still" "$tmp/left"
    done
    cat "$tmp/left"
    return 1
}

no_tracefs='umount -a -t tracefs,debugfs'

without_tracefs() {
    exits 0 '' unshare --mount sh -c "$no_tracefs; exec \"\$@\"" sh "./$@" --duration 0.3
}

# few_capabilities STATUS PATTERN PREPARATION TOOL...: in a mount namespace that has been prepared so
few_capabilities() {
    status=$1 pattern=$2 preparation=$3 tool=$4 caps=-all,+bpf,+perfmon
    shift 4
    cp ./*.py "$tmp"
    [ "$tool" = tcpv4connect ] || caps=$caps,+dac_read_search   # to see accept() by tracefs, which only root can read
    [ "$tool" != tcpchurn ] || caps=$caps,+sys_ptrace
    exits "$status" "$pattern" unshare --mount sh -c "$preparation && exec \"\$@\"" sh \
        setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps "$caps" --ambient-caps "$caps" \
        --bounding-set "$caps" "$python" "$tmp/$tool.py" --duration 0.3 "$@"
}

deleted_namespace() {
    namespace=tcpt-gone-$$-$1
    ip netns add "$namespace" || return 1
    (for _ in $(seq 100); do    # until it prints, so traces
        [ ! -s "$tmp/out" ] || break
        sleep 0.1
    done
    ip netns del "$namespace") &
    exits 0 '' "./$@" --netns "$namespace" --duration 2
}

ten_at_once() {
    runs=
    for n in 0 1 2 3 4 5 6 7 8 9; do
        timeout 60 "./$@" --duration 3 >/dev/null 2>"$tmp/err.$n" &
        runs="$runs $!"
    done
    for run in $runs; do
        wait "$run" || failed=yes
    done
    ! cat "$tmp"/err.* | grep . && [ -z "${failed:-}" ]
}

installs() {
    make -s install DESTDIR="$tmp/dest" PREFIX=/usr || return 1
    tool=$1
    shift
    "$tmp/dest/usr/sbin/$tool" --duration 0.3 "$@" &&
        test -s "$tmp/dest/usr/share/man/man8/$tool.8" && make -s uninstall DESTDIR="$tmp/dest" PREFIX=/usr &&
        [ -z "$(find "$tmp/dest" -type f)" ]
}

# Whatever strangers do is none of the tools' business here: they trace a namespace that nobody has connections in.
[ -n "${alone:-}" ] || [ "$(id -u)" != 0 ] || alone=yes exec unshare --net tests/live/cli.t "$@"

[ $# -gt 0 ] || eval "set -- $(make -s tools)"
for tool; do
    [ "$tool" = tcpchurn ] && process=$$ || process=
    set -- --netns "$(stat -L -c %i /proc/self/ns/net)" ${process:+"$process"}
    beside "$tool --help" exits 0 '' "./$tool" --help
    beside "$tool --help, and nobody reads it" no_reader "$tool" --help
    beside "$tool --help >/dev/full" exits 1 'No space left' env -u PYTHONUNBUFFERED \
        sh -c './$0 --help >/dev/full' "$tool"
    beside "$tool --ebpf" prints_program "$tool" --ebpf "$@"
    beside "$tool --ebpf, and nobody reads it" no_reader "$tool" --ebpf "$@"
    beside "$tool --nosuch" exits 2 '^usage: ' "./$tool" --nosuch
    beside "$tool without bcc" no_bcc "$tool" "$@"
    beside "$tool for nobody" unprivileged "$tool" "$@"
    if [ ! -r /sys/kernel/btf/vmlinux ] || [ "$(id -u)" != 0 ]; then
        together
        skip "$tool traces" "needs root and a kernel with BTF"
        continue
    fi
    beside "$tool --duration" exits 0 '' "./$tool" --duration 0.3 "$@"
    beside "$tool by its symlink from elsewhere" exits 0 '' env -C / "$PWD/$tool" --duration 0.3 "$@"
    beside "$tool alone" alone "$tool" "$@"
    beside "$tool >/dev/full" full_disk "$tool" "$@"
    beside "$tool | head -n 1" closed_pipe "$tool" "$@"
    beside "$tool >&-" closed_stdout "$tool" "$@"
    together
    beside "$tool with a BCC_KERNEL_SOURCE that is not there" no_tree "$tool" --json "$@"
    beside "$tool where there is no /proc" no_proc "$tool" ${process:+"$process"}
    beside "$tool for a namespace that is deleted" deleted_namespace "$tool" "$@"
    beside "$tool where tracefs is not mounted" without_tracefs "$tool" "$@"
    [ "$tool" != deeptcptracer ] || said='owners .* CAP_SYS_PTRACE'
    beside "$tool without root, with some capabilities" few_capabilities 0 "${said:-}" \
        "$no_tracefs; mount -t tracefs tracefs /sys/kernel/tracing" "$tool" "$@"
    if [ "$tool" = tcpv4connect ]; then
        beside "$tool with these, without tracefs" few_capabilities 0 '' "$no_tracefs" "$tool" "$@"
    else
        beside "$tool with these, without tracefs" few_capabilities 1 'sys.kernel' "$no_tracefs" "$tool" "$@"
    fi
    for locale in C C.UTF-8; do
        beside "$tool in the locale $locale" exits 0 '' env -u LANG LC_ALL=$locale "./$tool" --duration 0.3 "$@"
    done
    beside "$tool in 40 columns" exits 0 '' env COLUMNS=40 "./$tool" --duration 0.3 "$@"
    beside "$tool installed" installs "$tool" "$@"
    together
    beside "$tool and Ctrl-C" signalled 0 INT "$tool" "$@"
    beside "$tool and SIGTERM" signalled 0 TERM "$tool" "$@"
    beside "$tool and kill -9" signalled 137 KILL "$tool" "$@"
    together
    check "$tool, ten at once" ten_at_once "$tool" "$@"
done
plan
