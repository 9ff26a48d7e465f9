#!/bin/sh
# The tools' logic, without tracing.
cd "$(dirname "$0")" || exit 1
export PYTHONPATH=..:. PYTHONDONTWRITEBYTECODE=1
"${PYTHON:-/usr/bin/python3}" -m tap discover -s . -p 'unit_*.py' | sed '/^# TAP results for/d'
