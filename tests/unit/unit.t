#!/bin/sh
# The tools' logic, without tracing.
cd "$(dirname "$0")" || exit 1
../lib/run-python -m tap discover -s . -p 'unit_*.py' | sed '/^# TAP results for/d'
