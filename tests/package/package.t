#!/bin/sh
# The Debian package: built, installed, used and removed.
#
# usage: package.t RELEASE         (bookworm, trixie, ...; as root)
cd "$(dirname "$0")" || exit 1
export RELEASE="${1:?}" PYTHONDONTWRITEBYTECODE=1
"${PYTHON:-/usr/bin/python3}" -W ignore -m tap test_package | sed '/^# TAP results for/d'
