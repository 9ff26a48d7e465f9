#!/bin/sh
# Each tool in turn, on connections that the workload makes over loopback; ends by itself after some seconds.
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-/usr/bin/python3}

show() {        # show TOOL [OPTION...]: the tool while connections come and go
    printf '\n# ./%s\n' "$*"
    tool=$1
    shift
    "$python" "./$tool.py" --duration 4 "$@" &
    tracer=$!
    sleep 1.5
    "$python" tests/workload.py client_close server_close client_reset half_close refused >/dev/null
    wait "$tracer"
}

for tool in $(make -s tools); do
    show "$tool"
done
