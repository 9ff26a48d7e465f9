#!/bin/sh
# bcc's own tools with the types of btfheaders.py. The table in docs/benchmarks.md is what bpfcc.sh prints.
# shellcheck source=tests/lib/tap.sh disable=SC2031
. "$(dirname "$0")/../lib/tap.sh"

# nfsslower looks at a type of the module nfs, which is not in the BTF of vmlinux.
known='nfsslower'

works() {           # works TOOL RESULT
    echo "$2"
    case $2 in
    runs | 'no hook' | -) ;;
    *) case " $known " in *" $1 "*) ;; *) return 1 ;; esac ;;
    esac
}

if [ ! -e /sys/kernel/btf/vmlinux ] || ! command -v tcpconnect-bpfcc >/dev/null; then
    skip "bcc's own tools" "needs BTF and bpfcc-tools"
else
    sh tests/peers/bpfcc.sh >"$tmp/table"
    while read -r tool result; do
        check "$tool ($result)" works "$tool" "$result"
    done <"$tmp/table"
fi
plan
