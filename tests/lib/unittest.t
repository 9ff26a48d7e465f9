#!/bin/sh
# Modules of Python tests, as TAP.
#
# usage: unittest.t NAME ...       (test_tcplife, load_many, ...)
"$(dirname "$0")/run-python" -m tap "$@" | sed '/^# TAP results for/d'
