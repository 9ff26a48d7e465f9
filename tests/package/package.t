#!/bin/sh
# The Debian package: built, installed, used and removed; and make install.
#
# usage: package.t RELEASE         (bookworm, trixie, ...; as root)
RELEASE="${1:?}" exec "$(dirname "$0")/../lib/unittest.t" test_package
