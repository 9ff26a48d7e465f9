#!/bin/sh
# What can be said of the files without running them.
# shellcheck source=tests/lib/tap.sh disable=SC2031
. "$(dirname "$0")/../lib/tap.sh"

short_lines() {
    awk 'length > 120 {print FILENAME ":" FNR; bad = 1} END {exit bad}' ./*.py tests/*/*.* Makefile
}

runs_on_39() {      # no syntax newer than the oldest Python the tools promise
    .venv/bin/ruff check --select E9 --target-version py39 ./*.py tests/*/*.py
}

options_documented() {
    for option in $("$python" "$1.py" --help | grep -oE '(^|[ ,])--[a-z0-9-]+' | tr -d ' ,' | sort -u); do
        mandoc -T ascii "man/man8/$1.8" | col -b | grep -q -- "$option" || echo "$option is not in the man page"
        sed '/^USAGE/,$d' "examples/$1_example.txt" | grep -q -- "$option" || echo "$option is not in the example file"
    done >"$tmp/undocumented"
    ! grep . "$tmp/undocumented"
}

help_in_example() {     # the file ends with it, whatever this version of argparse calls its sections
    COLUMNS=80 "$python" "$1.py" --help | sed 's/^options:$/optional arguments:/' >"$tmp/help"
    sed 's/^options:$/optional arguments:/' "examples/$1_example.txt" | tail -n "$(wc -l <"$tmp/help")" |
        diff "$tmp/help" -
}

no_large_file() {       # 500 kB, in what might be committed
    ! find . \( -name .git -o -name .venv -o -name build -o -name __pycache__ \) -prune -o \
        -type f -size +500000c -print | grep .
}

version_of_changelog() {
    [ "$("$python" "$1.py" --version)" = "$1 $(sed -n 's/^## \[\([0-9.]*\)\].*/\1/p' CHANGELOG.md | head -n 1)" ]
}

mandoc_clean() {
    mandoc -T lint -W warning "$1"
}

check "ruff" .venv/bin/ruff check --quiet .
check "Python 3.9 syntax" runs_on_39
check "no phrase that a reader stumbles over" "$python" tests/static/texts.py phrases \
    ./*.md docs/*.md man/*/* examples/*.txt ./*.py tests/*/*.py tests/*/*.sh tests/*/*.t Makefile .ci/run
# shellcheck disable=SC2046     # one word a tool
check "every message is in a manual page" "$python" tests/static/texts.py messages $(make -s tools) btfheaders
check "the figures of README and manual pages are those of docs/benchmarks.md" \
    "$python" tests/static/texts.py figures
check "shellcheck" shellcheck -x tests/*/*.sh tests/*/*.t tests/lib/run-python .ci/run completion/tcp-tracers.bash \
    debian/*.postrm debian/tests/tools
check "no line over 120 columns" short_lines
check "no file over 500 kB" no_large_file
check "a part has the same text in all tools that share it" make -s same
make -s same | sed 's/^/# /'
check "tcp-tracers(7): the man page is sound" mandoc_clean man/man7/tcp-tracers.7
for tool in $(make -s tools); do
    check "$tool: the man page is sound" mandoc_clean "man/man8/$tool.8"
    check "$tool: every option is in the man page and in the example file" options_documented "$tool"
    check "$tool: the example file shows the help text of today" help_in_example "$tool"
    check "$tool: --version is what CHANGELOG.md says (make version)" version_of_changelog "$tool"
    check "$tool: a symlink and a run bit" test -L "$tool" -a -x "$tool.py"
done
plan
