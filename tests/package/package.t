#!/bin/sh
# The Debian package: built, installed, used and removed.
#
# usage: package.t RELEASE         (bookworm, trixie, ...; as root)
export RELEASE="${1:?}"
"$(dirname "$0")/../lib/python" -m tap test_package | sed '/^# TAP results for/d'
