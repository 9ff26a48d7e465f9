"""tcpaccept against what known processes did: see workload.py."""
import os
import random
import resource
import socket
import tempfile
import threading
import unittest

import live
import workload


def connection(record):
    return tuple(record[name] for name in ("ip", "raddr", "rport", "laddr", "lport", "netns"))


def key(record):
    return (record["pid"], record["comm"], *connection(record))


def accepted(log):
    """The records of connections that accept() has returned."""
    return [record for record in log if record["role"] == "server" and workload.scenario_of(record).accepted]


@unittest.skipUnless(live.MAY_TRACE, live.WHY_NOT)
class TcpacceptAgainstWorkload(unittest.TestCase):
    maxDiff = None

    def test_every_accept_once_by_who_called_it(self):
        modes = {(): live.every, ("--no-kprobe",): live.every, ("-4",): lambda record: record["ip"] == 4,
                 ("-6",): lambda record: record["ip"] == 6}
        tracers = [live.Tracer("tcpaccept", "--json", *options) for options in modes]
        with live.tracing(*tracers):
            log = workload.work(rounds=3)
        for (options, wanted), tracer in zip(modes.items(), tracers):
            with self.subTest(options=options):
                known = [record for record in accepted(log) if wanted(record)]
                self.assertTrue(known)
                self.assertEqual(live.compare(known, live.ours(log, tracer.objects, connection), key), ([], []))


class OneByOne(live.Alone):
    def test_filters(self):
        """By processes, ports, families and namespaces."""
        def visit(where):
            with socket.create_connection(where.getsockname()[:2]):
                where.accept()[0].close()
        with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other, \
                socket.create_server(("::1", 0), family=socket.AF_INET6) as v6:
            port = other.getsockname()[1]
            actor = live.Actor([lambda _: visit(one)])

            def play():
                actor.do(0)
                visit(one)
                visit(other)
                visit(v6)
                with live.network(self.namespaces.server), socket.create_server(("127.0.0.1", 0)) as elsewhere:
                    visit(elsewhere)
            self.check_filters("tcpaccept", {
                ("-p", actor.pid): (lambda line: line["pid"] == actor.pid, 1),
                ("-P", "1,%d" % port): (lambda line: line["lport"] == port, 1),
                ("-4",): (lambda line: line["ip"] == 4, 4),
                ("-6",): (lambda line: line["ip"] == 6, 1),
                ("--raddr", "!::1"): (lambda line: line["ip"] == 4, 4),
                ("--laddr", "::/0"): (lambda line: line["ip"] == 6, 1),
                ("--netns", self.namespaces.client): (lambda line: line["netns"] == self.netns, 4),
                ("--netns", self.namespaces.inode(self.namespaces.server), "-p", os.getpid()): (
                    lambda line: line["netns"] != self.netns, 1)}, play)
            actor.end()

    def test_other_protocols_are_not_shown(self):
        with tempfile.TemporaryDirectory() as folder, live.Tracer("tcpaccept", "--netns", self.netns) as tracer:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(folder + "/socket")
            listener.listen()
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(folder + "/socket")
                listener.accept()[0].close()
            listener.close()
        self.assertEqual(len(tracer.lines), 1)

    def test_multipath_tcp(self):
        try:
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
        except OSError as error:
            self.skipTest("this kernel has no MPTCP: %s" % error)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with live.Tracer("tcpaccept", "--json", "--netns", self.netns) as tracer:
            for protocol in (262, 0):
                with socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol) as client:
                    client.connect(listener.getsockname())
                    listener.accept()[0].close()
        listener.close()
        self.assertEqual([line["pid"] for line in tracer.objects], [os.getpid()] * 2)

    def test_high_descriptors(self):
        listener = socket.create_server(("127.0.0.1", 0))

        def work():
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (200000, 200000))
            except ValueError:          # root without CAP_SYS_RESOURCE: as many as there may be
                resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            clients = []
            for first in (1025, min(100001, limit - 8)):
                while os.dup(2) < first:
                    pass
                clients.append(socket.create_connection(listener.getsockname()))
                fd = listener._accept()[0]
                assert fd >= first, fd
            return [client.getsockname()[1] for client in clients]
        with listener, live.Tracer("tcpaccept", "--json", "--netns", self.netns) as tracer:
            pid, ports = live.in_process(work)
        self.assertEqual([(line["pid"], line["rport"]) for line in tracer.objects],
                         [(pid, port) for port in ports])

    def test_descriptors_closed_by_another_thread(self):
        """printed + reported as lost = made, and what is printed is true."""
        listener = socket.create_server(("127.0.0.1", 0), backlog=1000)
        port = listener.getsockname()[1]

        def work():
            elsewhere = socket.create_server(("127.0.0.2", 0), backlog=10000)
            low = elsewhere.fileno() + 1
            log, over = [], threading.Event()

            def accept():
                while not over.is_set():
                    log.append("%s %d" % listener._accept()[1])

            def close():
                while not over.is_set():
                    try:
                        os.close(random.randrange(low, low + 8))        # noqa: S311
                    except OSError:
                        pass

            def connect():
                address = elsewhere.getsockname()
                while not over.is_set():
                    try:
                        sock = socket.socket()
                        sock.detach() if sock.connect_ex(address) else sock.close()
                    except OSError:
                        sock.detach()
            for target in [accept] * 4 + [close] * 2 + [connect]:
                threading.Thread(target=target, daemon=True).start()
            address = listener.getsockname()

            def visit():
                for _ in range(2000):
                    with socket.socket() as client:
                        client.connect(address)
                        workload.reset(client)
            visitor = workload.spawn("visitor", None, visit)
            os.waitpid(visitor, 0)
            live.settle(0.2)
            over.set()
            return log
        with listener, live.Tracer("tcpaccept", "--json", "--netns", self.netns, check=False) as tracer:
            pid, log = live.in_process(work)
        missing, foreign = live.compare(
            log, ["%s %d" % (line["raddr"], line["rport"]) for line in tracer.objects], str)
        self.assertEqual(foreign, [])
        self.assertEqual({(line["pid"], line["lport"]) for line in tracer.objects}, {(pid, port)})
        self.assertEqual((tracer.status, len(missing)), (0, live.reported_losses(tracer)))
        self.assertEqual(len(log), 2000)

    def test_many_threads_waiting(self):
        """A return probe would run out of places for threads that wait in accept()."""
        listener = socket.create_server(("127.0.0.1", 0), backlog=1000)

        def work():
            crowd = [threading.Thread(target=lambda: listener.accept()[0].close()) for _ in range(300)]
            for thread in crowd:
                thread.start()
            live.settle(0.3)
            for _ in crowd:
                socket.create_connection(listener.getsockname()).close()
            for thread in crowd:
                thread.join()
            return []
        with listener, live.Tracer("tcpaccept", "--netns", self.netns) as tracer:
            live.in_process(work)
        self.assertEqual(len(tracer.lines), 301)
