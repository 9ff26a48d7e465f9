#!/bin/sh
# Each tool in turn, on connections that are made here over loopback; ends by itself after some seconds.
cd "$(dirname "$0")/../.." || exit 1
python=${PYTHON:-/usr/bin/python3}
failed=$(mktemp) && trap 'rm -f "$failed"' EXIT

show() {        # show TOOL [OPTION...]: its first lines while connections come and go
    printf '\n# ./%s\n' "$*"
    tool=$1
    shift
    { "$python" "./$tool.py" --duration 4 "$@" || echo "$tool" >>"$failed"; } | head -n 16 &
    tracer=$!
    sleep 2
    "$python" tests/lib/workload.py client_close server_reset refused >/dev/null
    wait "$tracer"
}

for tool in $(make -s tools); do
    [ "$tool" = tcpchurn ] || show "$tool"
done

# A process that opens two connections and closes one, five times.
"$python" -c '
import socket, time
server = socket.create_server(("127.0.0.1", 0))
kept = []
for _ in range(5):
    kept.append(socket.create_connection(server.getsockname()))
    socket.create_connection(server.getsockname()).close()
    time.sleep(0.7)
' &
show tcpchurn -w 1 2 5 -- $!
wait
! sed 's/$/ has failed/' "$failed" | grep . >&2
