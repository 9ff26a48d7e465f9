#!/bin/sh
# Which of bcc's own tools work with the types of btfheaders.py, without kernel headers: one line for each tool.
#
# usage: bpfcc.sh [-a | TOOL ...]       (default: those that look at the network; -a: all)
#
# runs        was tracing until it was stopped, after WAIT seconds (default 3)
# compiles    the kernel lacks what it attaches to, mostly kprobes
# -           it needs arguments, or something that is not here
# fails       and why: it does not compile, the verifier refuses it, or it ends with an error of its own
set -eu

cd "$(dirname "$0")/.."
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
network='bindsnoop gethostlatency mptcpify netqtop nfsdist nfsslower skbdrop sofdsnoop solisten sslsniff tcpaccept
    tcpcong tcpconnect tcpconnlat tcpdrop tcplife tcpretrans tcprtt tcpstates tcpsubnet tcpsynbl tcptop tcptracer'

path_of() {         # path_of TOOL: as Debian and Ubuntu, or as Fedora and bcc itself install it
    for path in "/usr/sbin/$1-bpfcc" "/usr/share/bcc/tools/$1"; do
        [ ! -x "$path" ] || echo "$path"
    done
}

all_tools() {
    for path in /usr/sbin/*-bpfcc /usr/share/bcc/tools/*; do
        ! head -n 1 "$path" 2>/dev/null | grep -q python || basename "$path" -bpfcc
    done
}

arguments() {       # arguments TOOL: those that it cannot do without
    case $1 in
    argdist) echo '-C t:sched:sched_switch()' ;;
    funccount | funclatency | funcslower | stackcount | trace) echo tcp_sendmsg ;;
    netqtop) printf '%s\n' '-n lo' ;;
    tcpsubnet) echo 10.0.0.0/8 ;;
    esac
}

why() {             # why PATTERN: the first line of the output that matches it, short and without the position
    grep -hE "$1" "$tmp/out" | head -n 1 | sed 's/^.*error: //; s/^.*warning: //' | cut -c 1-80
}

result() {          # result TOOL PATH
    # shellcheck disable=SC2046     # may be two words or none
    BCC_KERNEL_SOURCE=$tmp/tree timeout -s INT -k 2 "${WAIT:-3}" "$2" $(arguments "$1") \
        >"$tmp/out" 2>&1 </dev/null || true
    if grep -qE '^usage: |USDT|pidof|kprobes/blacklist' "$tmp/out"; then
        echo -
    elif grep -qE ' error: |implicit declaration' "$tmp/out"; then
        echo "fails: $(why ' error: |implicit declaration')"
    elif grep -q 'Failed to load' "$tmp/out"; then
        echo "fails: $(why 'Failed to load')"
    elif grep -qE 'Failed to attach|not traceable' "$tmp/out"; then
        echo compiles
    elif grep -E '^[A-Za-z.]*(Error|Exception):' "$tmp/out" >"$tmp/error"; then
        echo "fails: $(tail -n 1 "$tmp/error")"
    else
        echo runs
    fi
}

./btfheaders.py "$tmp/tree"
# shellcheck disable=SC2046,SC2086  # lists
case ${1:-} in
-a) set -- $(all_tools) ;;
'') set -- $network ;;
esac
for tool; do
    path=$(path_of "$tool")
    [ -z "$path" ] || printf '%-16s %s\n' "$tool" "$(result "$tool" "$path")"
done
