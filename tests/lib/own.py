"""What tests with few connections share: both ends of a connection in one process, and tracers beside strangers."""
import re
import socket

import live


class Tracer(live.Tracer):
    """The kernel may skip programs for strangers' events, while many tools trace. A test counts its own."""

    def stop(self, *number):
        super().stop(*number)
        self.stderr = re.sub("(?m)^.* lost: the kernel did not run the probe\n", "", self.stderr)


def pair(listener):
    """Returns both ends of a connection: the client's and the server's."""
    client = socket.create_connection(listener.getsockname())
    return client, listener.accept()[0]


def connect(listener, times=1):
    """Open and close connections to the listener in this process. The client closes first."""
    for _ in range(times):
        for end in pair(listener):
            end.close()


def ports(line):
    """Returns the local and the remote port of a JSON object."""
    return line.get("lport", line.get("sport")), line.get("rport", line.get("dport"))
