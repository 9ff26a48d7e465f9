#!/usr/bin/python3
"""Run tcplife with its output added to a file, as tcplife.service does.

usage: tcplife-log.py FILE [OPTION ...]

The file is opened by its name for each write, so that it can be renamed at any time: no line is lost or split. What a
full disk or a crash has left of a line stays on a line of its own.
"""
import os
import signal
import sys

import tcplife


def main():
    if len(sys.argv) < 2:
        sys.exit("usage: tcplife-log.py FILE [OPTION ...]")
    path = sys.argv.pop(1)

    def write(text):
        with open(path, "ab+") as file:
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                file.write(b"\n")       # a full disk or kill -9 has left a part of a line
            file.write(text.encode())

    tcplife.write = write
    signal.pthread_sigmask(signal.SIG_BLOCK, tcplife.STOP_SIGNALS)
    tcplife.main()


if __name__ == "__main__":
    main()
