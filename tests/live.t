#!/bin/sh
# The tools on real connections of known processes.
#
# usage: live.t NAME ...       (test_tcplife, load_many, ...)
cd "$(dirname "$0")" || exit 1
export PYTHONPATH=..:. PYTHONDONTWRITEBYTECODE=1
"${PYTHON:-/usr/bin/python3}" -W ignore -m tap "$@" | sed '/^# TAP results for/d'
