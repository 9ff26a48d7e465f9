#!/bin/sh
# Which of bcc's own tools work with the types of btfheaders.py, without kernel headers: one line for each tool.
#
# usage: bpfcc.sh [-a | TOOL ...]       (default: those that look at the network; -a: all)
#
# runs        had a program in the kernel within WAIT seconds (default 20), and still two seconds later
# no hook     compiles, and ends after that, mostly because there are no kprobes
# fails       does not compile, or the kernel refuses it
# -           ends before that: it needs arguments, or something that is not here
set -eu

cd "$(dirname "$0")/../.."
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
network='bindsnoop gethostlatency mptcpify netqtop nfsdist nfsslower skbdrop sofdsnoop solisten sslsniff tcpaccept
    tcpcong tcpconnect tcpconnlat tcpdrop tcplife tcpretrans tcprtt tcpstates tcpsubnet tcpsynbl tcptop tcptracer'

all_tools() {
    for path in /usr/sbin/*-bpfcc /usr/share/bcc/tools/*; do
        ! head -n 1 "$path" 2>/dev/null | grep -q python || basename "$path" -bpfcc
    done
}

path_of() {         # path_of TOOL: as Debian and Ubuntu, or as Fedora and bcc itself install it
    for path in "/usr/sbin/$1-bpfcc" "/usr/share/bcc/tools/$1"; do
        [ ! -x "$path" ] || echo "$path"
    done
}

arguments() {       # arguments TOOL: those that it cannot do without
    case $1 in
    argdist) echo '-C t:sched:sched_switch()' ;;
    funccount | funclatency | funcslower | stackcount | trace) echo tcp_sendmsg ;;
    netqtop) printf '%s\n' '-n lo' ;;
    sslsniff) echo --no-nss --no-gnutls ;;
    tcpsubnet) echo 10.0.0.0/8 ;;
    esac
}

has_program() {     # has_program PID
    find "/proc/$1/fd" -lname 'anon_inode:bpf-prog' 2>/dev/null | grep -q .
}

result() {          # result TOOL PATH
    # shellcheck disable=SC2046     # may be two words or none
    BCC_KERNEL_SOURCE=$tmp/tree PYTHONPATH=$tmp "$2" $(arguments "$1") >"$tmp/out" 2>&1 </dev/null &
    pid=$!
    for _ in $(seq "${WAIT:-20}"); do
        sleep 1
        ! has_program $pid || break
        [ -d "/proc/$pid" ] || break
    done
    sleep 2
    result='-'
    ! grep -q '^bpfcc.sh: compiled' "$tmp/out" || result='no hook'
    ! has_program $pid || result=runs
    kill $pid 2>/dev/null || true
    wait $pid 2>/dev/null || true
    grep -E '[0-9]: error: |implicit declaration|Failed to load' "$tmp/out" >"$tmp/errors" || true
    if [ -s "$tmp/errors" ]; then
        result="fails: $(head -n 1 "$tmp/errors" | sed 's/^.*error: //; s/^.*warning: //' | cut -c 1-80)"
    fi
    echo "$result"
}

./btfheaders.py "$tmp/tree"
cat >"$tmp/sitecustomize.py" <<'END'
import sys
import bcc
compile_text = bcc.lib.bpf_module_create_c_from_string
def compile_and_tell(*args):
    module = compile_text(*args)
    if module:
        print("bpfcc.sh: compiled", file=sys.stderr, flush=True)
    return module
bcc.lib.bpf_module_create_c_from_string = compile_and_tell
END
# shellcheck disable=SC2046,SC2086  # lists
case ${1:-} in
-a) set -- $(all_tools) ;;
'') set -- $network ;;
esac
for tool; do
    path=$(path_of "$tool")
    [ -z "$path" ] || printf '%-16s %s\n' "$tool" "$(result "$tool" "$path")"
done
