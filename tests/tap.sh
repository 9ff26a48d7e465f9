# TAP from shell: source this, call check, and end with plan.
# shellcheck shell=sh

checks=0
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-/usr/bin/python3}
tmp=$(mktemp -d) && trap 'rm -rf "$tmp"' EXIT
export tmp python

# check NAME COMMAND...: a test that passes if the command does; what it printed is shown if not
check() {
    name=$1
    shift
    checks=$((checks + 1))
    if "$@" >"$tmp/said" 2>&1; then
        echo "ok $checks - $name"
    else
        echo "not ok $checks - $name"
        sed 's/^/# /' "$tmp/said"
    fi
}

# skip NAME WHY
skip() {
    checks=$((checks + 1))
    echo "ok $checks - $1 # SKIP $2"
}

plan() {
    echo "1..$checks"
}
