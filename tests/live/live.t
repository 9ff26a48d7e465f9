#!/bin/sh
# The tools on real connections of known processes.
#
# usage: live.t NAME ...       (test_tcplife, load_many, ...)
"$(dirname "$0")/../lib/python" -m tap "$@" | sed '/^# TAP results for/d'
