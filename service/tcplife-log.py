#!/usr/bin/python3
"""Run tcplife with its output added to a file, as tcplife.service does.

usage: tcplife-log.py FILE [OPTION ...]

The file is opened by its name for each write, so that it can be renamed at any time: no line is lost or split.
"""
import signal
import sys

import tcplife


def main():
    path = sys.argv.pop(1)

    def write(text):
        with open(path, "a") as file:
            file.write(text)

    tcplife.write = write
    signal.pthread_sigmask(signal.SIG_BLOCK, tcplife.STOP_SIGNALS)
    tcplife.main()


if __name__ == "__main__":
    main()
