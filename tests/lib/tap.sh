# TAP from shell: source this, call check or beside, and end with plan.
# shellcheck shell=sh

checks=0
cd "$(dirname "$0")/../.." || exit 1
python=${PYTHON:-/usr/bin/python3}
tmp=$(mktemp -d) && trap 'rm -rf "$tmp"' EXIT
chmod 755 "$tmp"
export tmp python

# check NAME COMMAND...: a test that passes if the command does; what it printed is shown if not
check() {
    checks=$((checks + 1))
    result "$checks" "$@"
}

# beside NAME COMMAND...: the same, in parallel with the others started this way; together() prints the results
beside() {
    checks=$((checks + 1))
    result "$checks" "$@" >"$tmp/$checks.tap" &
}

together() {
    wait
    cat "$tmp"/*.tap && rm "$tmp"/*.tap
}

# In a subshell, with a directory for temporary files of this check only
result() (
    tmp=$tmp/$1 name=$2
    shift 2
    mkdir "$tmp"
    if "$@" >"$tmp/said" 2>&1; then
        echo "ok - $name"
    else
        echo "not ok - $name"
        sed 's/^/# /' "$tmp/said"
    fi
)

# skip NAME WHY
skip() {
    checks=$((checks + 1))
    echo "ok - $1 # SKIP $2"
}

plan() {
    echo "1..$checks"
}
