# The text of debian/changelog, from CHANGELOG.md: the versions with their dates, and what they say.
# usage: awk -f changelog.awk -v maintainer="NAME <ADDRESS>" CHANGELOG.md
function finish() {
    if (version) {
        ("date -R -u -d " date) | getline date
        printf "\n -- %s  %s\n\n", maintainer, date
    }
    version = ""
}
/^## / {
    finish()
}
/^## \[[0-9]/ {
    version = substr($2, 2, length($2) - 2)
    date = $4
    printf "tcp-tracers (%s) unstable; urgency=medium\n\n", version
}
version && /^(- |  )/ {
    sub(/^- /, "* ")
    print "  " $0
}
END {
    finish()
}
