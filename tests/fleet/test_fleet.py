"""tcplife and tcpchurn in a pipeline of stock parts: what known processes did is what the queries answer.

The tests build on each other, in the order of their names: a later one asks for what was stored in an earlier one.
"""
import itertools
import json
import mmap
import os
import pathlib
import re
import signal
import socket
import subprocess
import tempfile
import time
import unittest
import urllib.parse
from unittest import mock

import live
import parts
import test_tcplife
import workload

NAME = b'a"b\n\xff'                                 # what a process calls itself
DEAD = "127.0.0.9", 9                               # nobody listens there
PEER = "127.0.0.7"
FAST, SLOW, REFUSED, CHURN, BYTES = 30, 20, 200, 300, 300_000_000     # more than this test itself fetches
NETNS = "tcpt-fleet-%d" % os.getpid()


def serve(listener, times, hold):
    for _ in range(times):
        with listener.accept()[0] as sock:
            workload.receive(sock)
            time.sleep(hold)


def visit(address, times, count):
    """Send so many bytes, end, and wait for the server to end too."""
    for _ in range(times):
        with socket.create_connection(address) as sock:
            workload.send(sock, count)
            sock.shutdown(socket.SHUT_WR)
            workload.receive(sock)


def sessions(server, client, listener, times, hold=0, count=100):
    """So many sessions one after the other between processes of these names."""
    workload.wait(workload.spawn(server, None, serve, listener, times, hold),
                  workload.spawn(client, None, visit, listener.getsockname(), times, count))


def refused():
    for _ in range(REFUSED):
        socket.socket().connect_ex(DEAD)


def named(name, work, *args):
    """Do this under a name of any bytes."""
    with open("/proc/self/comm", "wb") as comm:
        comm.write(name)
    work(*args)


def tsv(rows):
    return [line.split("\t") for line in rows.splitlines()]


def is_same(one, other):
    """Whether two cells are equal, or one number that one program has rounded down and another one up."""
    places = max(len(cell.partition(".")[2]) for cell in (one, other))
    return one == other or (places and abs(round((float(one) - float(other)) * 10 ** places)) == 1)


def setUpModule():
    parts.prepare()


@unittest.skipUnless(live.MAY_TRACE, live.WHY_NOT)
class Fleet(unittest.TestCase):
    maxDiff = None

    @classmethod
    def setUpClass(cls):
        cls.servers = [parts.ClickHouse(name) for name in parts.SHARDS]
        cls.server, cls.collector = cls.servers[0], parts.SyslogNg()
        for server in cls.servers:
            cls.addClassCleanup(server.stop)
            server.start()
            server.create()
        cls.collector.configure()
        cls.addClassCleanup(cls.collector.stop)
        cls.collector.start()
        cls.witness = live.Tracer("tcplife", "--json", "--netns", "/proc/self/ns/net").__enter__()
        cls.addClassCleanup(cls.witness.process.kill)
        cls.shop = socket.create_server(("127.0.0.1", 0))
        sessions("shop", "proxy", cls.shop, FAST)
        cls.fast = time.time()

    def check(self, log, database="default"):
        """Exactly these sessions arrive, once each, of these owners. How exact the times are is for test_tcplife."""
        def arrived():
            rows = [{name: value for name, value in row.items() if (name, value) != ("comm_hex", "")}
                    for row in self.server.rows("SELECT * FROM tcplife", database)]
            return live.ours(log, rows, test_tcplife.connection)
        try:
            parts.until(lambda: len(arrived()) >= len(log), 10)
        except AssertionError:
            pass            # the difference says more
        time.sleep(2)       # for what comes a second time
        with mock.patch.object(test_tcplife, "MS", 1000):
            self.assertEqual(test_tcplife.difference(log, arrived()), ([], []))

    @live.by_timer
    def test_1_every_session_once(self):
        self.check(workload.sessions(workload.work()))

    def test_2_any_name(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            sessions("named", "to be named", listener, 1)
            workload.wait(workload.spawn("server", None, serve, listener, 1, 0),
                          workload.spawn("client", None, named, NAME, visit, listener.getsockname(), 1, 100))
            where = "rport = %d AND comm_hex != ''" % listener.getsockname()[1]
        row, = parts.until(lambda: self.server.rows("SELECT * FROM tcplife WHERE " + where))
        self.assertEqual((row["comm"], bytes.fromhex(row["comm_hex"])), ('a"b\n\\xff', NAME))

    @live.by_timer
    def test_3_the_store_was_away(self):
        self.server.stop()
        log = workload.sessions(workload.work())
        time.sleep(10)
        self.server.start()
        self.check(log)

    @live.by_timer
    def test_4_the_store_was_away_and_the_collector_killed(self):
        self.server.stop()
        log = workload.sessions(workload.work())
        time.sleep(3)
        self.collector.stop(signal.SIGKILL)
        self.collector.start()
        log += workload.sessions(workload.work())
        self.server.start()
        self.check(log)

    @live.by_timer
    def test_5_broken_lines_and_a_missing_table(self):
        """What is no session is a message; a line that is none costs no other one; a missing table costs nothing."""
        self.server.post("TRUNCATE TABLE tcplife_messages")
        self.server.post("RENAME TABLE tcplife TO elsewhere")
        log = workload.sessions(workload.work(("client_close",)))
        time.sleep(3)
        self.server.post("RENAME TABLE elsewhere TO tcplife")
        with open("/proc/%d/fd/1" % parts.until(self.collector.is_up), "w") as pipe:
            pipe.write('{"ts":1,"pid":\nno JSON \\ "at all"\n')
        log += workload.sessions(workload.work(("server_close",)))
        self.check(log)
        self.assertEqual(sorted(row["message"] for row in self.server.rows("SELECT * FROM tcplife_messages")),
                         ['no JSON \\ "at all"', '{"ts":1,"pid":'])

    def test_6_the_questions(self):
        """On the server that has collected; then the same data on two shards, on one server and with chDB."""
        while int(time.time() // 60) == int(self.fast // 60) or time.time() % 60 > 45:
            time.sleep(1)
        sessions("shop", "proxy", self.shop, SLOW, 0.2)
        with socket.create_server(("127.0.0.1", 0)) as sink, socket.create_server(("127.0.0.8", 0)) as busy, \
                socket.create_server((PEER, 0)) as peer:
            sessions("sink", "mover", sink, 1, count=BYTES)
            sessions("busy", "churner", busy, CHURN)
            for n in 1, 2, 3:
                sessions("peer", "visitor%d" % n, peer, 1, count=100 * n)
            workload.wait(workload.spawn("caller", None, refused))
            ports = self.shop.getsockname()[1], busy.getsockname()[1], peer.getsockname()[1]
        time.sleep(0.3)
        self.witness.stop()
        self.assertEqual(self.witness.status, 0, self.witness.stderr)
        queries = [query.replace("10.30.0.32", PEER) for query in parts.statements("queries.sql")]
        parts.until(lambda: self.server.rows("SELECT * FROM tcplife WHERE comm = 'caller'"))
        time.sleep(2)
        self.answers(self.server, "default", queries, ports)
        minutes, = self.server.rows("SELECT sum(n) AS n FROM tcplife_minutes")
        self.assertEqual([minutes], self.server.rows("SELECT count() AS n FROM tcplife"))

        # a machine that has been quiet for two hours
        self.server.post("INSERT INTO tcplife FORMAT JSONEachRow",
                         json.dumps({"host": "web0", "ts": time.time() - 7200, "comm": "last words"}))
        quiet, loud = tsv(self.server.post(queries[5]))
        self.assertEqual((quiet[:2], loud[0]), (["web0", "1"], parts.HOST))

        self.collector.stop()
        self.same_everywhere(queries, ports)

    def answers(self, server, database, queries, ports):
        """The first five queries give what the processes did."""
        shop, busy, peer = (str(port) for port in ports)
        slow, refused, moved, churned, visits = (tsv(server.post(query, database=database)) for query in queries[:5])
        self.assertEqual(slow[0][2:4], [shop, str(SLOW)])
        self.assertTrue(200 <= float(slow[0][4]) < 250 and float(slow[0][5]) < 100, slow)
        host, comm, raddr, rport, end, err, n, _, _ = refused[0]
        self.assertEqual((comm, raddr, rport, end, err, n),
                         ("caller", DEAD[0], str(DEAD[1]), "refused", "ECONNREFUSED", str(REFUSED)))
        self.assertEqual(sorted(row[1:] for row in moved[:2]), [["mover", "connect", "1", str(BYTES), "0"],
                                                                ["sink", "accept", "1", "0", str(BYTES)]])
        self.assertEqual(churned[0][:5], [host, "churner", "127.0.0.8", busy, str(CHURN)])
        self.assertEqual([[row[2], *row[5:8], row[9]] for row in visits],
                         [["visitor%d" % n, peer, str(100 * n), "0", "local"] for n in (3, 2, 1)])

    def same_everywhere(self, queries, ports):
        lines = self.witness.stdout.splitlines()
        for server in self.servers:
            server.post("TRUNCATE TABLE tcplife")
        one = self.servers[1]
        one.post("CREATE DATABASE one")
        one.post("CREATE TABLE one.tcplife AS default.tcplife")
        insert = "INSERT INTO tcplife FORMAT JSONEachRow"
        lines = ['{"host":"here",' + line[1:] for line in lines]
        for number, server in enumerate(self.servers):
            server.post(insert, "\n".join(lines[number::2]))
        one.post(insert, "\n".join(lines), database="one")
        for server in self.servers:
            self.answers(server, "fleet", queries, ports)
        self.only_minutes(one, insert, lines)
        expected = "".join(one.post(query, database="one") for query in queries[:6])
        self.assertEqual("".join(one.post(query, database="fleet") for query in queries[:6]), expected)
        with tempfile.TemporaryDirectory() as folder:
            still_open = dict(self.witness.objects[0], end="open", err=None)    # changes no answer
            pathlib.Path(folder, "life.json").write_text(self.witness.stdout + json.dumps(still_open) + "\n")
            sql = (parts.EXAMPLES / "life.sql").read_text() + ";\n".join(queries)
            chdb = subprocess.run([parts.CHDB, "-m", "chdb", sql, "TabSeparated"], cwd=folder, capture_output=True,
                                  text=True)
            self.assertEqual(chdb.returncode, 0, chdb.stderr)
            for row, other in itertools.zip_longest(tsv(chdb.stdout), tsv(expected), fillvalue=[]):
                self.assertTrue(len(row) == len(other) and all(map(is_same, row, other)), (row, other))

    def only_minutes(self, server, insert, lines):
        """With ENGINE = Null the minutes are all that is stored."""
        server.post("CREATE DATABASE minutes")
        nothing = re.sub(" MergeTree PARTITION BY toDate.toUInt32.*", " Null", parts.old("tcplife.sql"))
        server.client("-d", "minutes", "-n", stdin=nothing + parts.old("minutes.sql"))
        server.post(insert, "\n".join(lines), database="minutes")
        self.assertEqual(server.rows("SELECT count() AS n FROM tcplife", "minutes"), [{"n": 0}])
        self.assertEqual(server.rows("SELECT sum(n) AS n FROM tcplife_minutes", "minutes"), [{"n": len(lines)}])

    @live.by_timer
    def test_7_one_of_two_servers_is_away(self):
        self.collector.stop()
        self.collector.configure(servers=parts.SHARDS)
        self.collector.start()
        log = workload.sessions(workload.work(("client_close",)))
        time.sleep(2)
        self.server.stop()
        log += workload.sessions(workload.work(("server_close",)))
        parts.until(lambda: self.servers[1].rows("SELECT * FROM tcplife WHERE comm = 'cli-server_clos'"))
        self.server.start()
        self.check(log, "fleet")

    def test_8_losses(self):
        """What a full buffer costs arrives to the unit, and the query says so."""
        for command in "netns add " + NETNS, "-n %s link set lo up" % NETNS:
            subprocess.run(["ip", *command.split()], check=True)
        self.addCleanup(subprocess.run, ["ip", "netns", "del", NETNS])
        load, netns = live.Load(NETNS), live.Namespaces.inode(NETNS)
        self.server.post("TRUNCATE TABLE tcplife_messages")
        self.collector.stop()
        self.collector.configure(NETNS)
        self.collector.start()
        pid = parts.until(self.collector.is_up)
        os.kill(pid, signal.SIGSTOP)
        load.run(25000, 2)
        os.kill(pid, signal.SIGCONT)

        def kept_and_lost():
            kept, = self.server.rows("SELECT count() AS n FROM tcplife WHERE netns = %d" % netns)
            lost = tsv(self.server.post(parts.statements("queries.sql")[6]))
            if kept["n"] + sum(int(row[3]) for row in lost) == 100000:
                return lost
        (host, _, _, lost, what), = parts.until(kept_and_lost)
        self.assertEqual((host, what), (parts.HOST, "sessions lost: the ring buffer was full"))
        self.assertGreater(int(lost), 0)


    def test_9_open_sessions(self):
        """They are in a table of their own until they end; there, the last line of a session is the one that stays."""
        self.collector.stop()
        self.collector.configure("/proc/self/ns/net -i 1")
        self.collector.start()
        with socket.create_server((PEER, 0)) as listener:
            where = "WHERE rport = %d" % listener.getsockname()[1]

            def moved(count):
                rows = self.server.rows("SELECT * FROM tcplife_open FINAL " + where)
                return rows if [row["tx_bytes"] for row in rows] == [count] else None
            with socket.create_connection(listener.getsockname()) as client, listener.accept()[0] as server:
                for count, total in (10, 10), (20, 30):
                    client.sendall(b"x" * count)
                    row, = parts.until(lambda total=total: moved(total))
                    self.assertEqual((row["end"], row["pid"]), ("open", os.getpid()))
                self.assertEqual(self.server.rows("SELECT * FROM tcplife " + where), [])
                workload.receive(server, 30)
                client.close()
        row, = parts.until(lambda: self.server.rows("SELECT * FROM tcplife " + where))
        self.assertEqual((row["end"], row["tx_bytes"]), ("local", 30))


@unittest.skipUnless(live.MAY_TRACE, live.WHY_NOT)
class Prometheus(unittest.TestCase):
    RATE = 50               # connections per second, or a little less on a busy machine

    def client(self, made):
        """Accepts and opens at that rate, and closes all but every tenth. made: memory for how many there were."""
        kept = []
        with socket.create_server(("127.0.0.1", 0)) as listener:
            due = time.monotonic()
            for n in range(10 ** 6):
                pair = socket.create_connection(listener.getsockname()), listener.accept()[0]
                if n % 10:
                    for sock in pair:
                        sock.close()
                else:
                    kept.append(pair)
                made[:4] = n.to_bytes(4, "little")
                due += 1 / self.RATE
                time.sleep(max(0, due - time.monotonic()))

    def value(self, query):
        """What Prometheus answers; None if there is no such series."""
        answer = parts.get("http://127.0.0.1:9090/api/v1/query?" + urllib.parse.urlencode({"query": query}))
        return [(one["metric"], float(one["value"][1])) for one in json.loads(answer)["data"]["result"]]

    @classmethod
    def setUpClass(cls):
        folder = pathlib.Path(tempfile.mkdtemp())
        (folder / "prometheus.yml").write_text(json.dumps({
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(path) for path in parts.EXAMPLES.glob("*.rules.yml")],
            "scrape_configs": [{"job_name": "node", "static_configs": [{"targets": ["127.0.0.1:9100"]}]}]}))
        for server in (parts.Web("node-exporter", "http://127.0.0.1:9100/metrics", "prometheus-node-exporter",
                                 "--web.listen-address=127.0.0.1:9100"),
                       parts.Web("prometheus", "http://127.0.0.1:9090/-/ready", "prometheus",
                                 "--config.file=%s" % (folder / "prometheus.yml"),
                                 "--storage.tsdb.path=%s" % (folder / "data"),
                                 "--web.listen-address=127.0.0.1:9090")):
            cls.addClassCleanup(server.stop)
            server.start()

    @live.by_timer
    def test_rate(self):
        """rate() is the rate that was made, and the file is gone in the end."""
        made, window, file = mmap.mmap(-1, 4), 20, pathlib.Path("/var/lib/prometheus/node-exporter/tcpchurn.prom")
        pid = os.fork()
        if not pid:
            signal.alarm(60)
            named(NAME, self.client, made)
        with live.Tracer("tcpchurn", "--prometheus", file, "-i", "0.1", pid) as tracer:
            time.sleep(3)
            before, began = int.from_bytes(made, "little"), time.monotonic()
            time.sleep(window)
            known = (int.from_bytes(made, "little") - before) / (time.monotonic() - began)
            labels = '{pid="%d"}' % pid
            connects, accepts, closes = (self.value("rate(tcpchurn_%s_total%s[%ds])" % (what, labels, window))
                                         for what in ("connects", "accepts", "closes"))
            opened = self.value("deriv(tcpchurn_open%s[%ds])" % (labels, window))
            lost = self.value("tcpchurn_lost_total" + labels)
            (_, started), = self.value("tcpchurn_start_time_seconds" + labels)
            errors = self.value("node_textfile_scrape_error")
            text = file.read_text()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self.assertEqual(connects[0][0]["comm"], 'a"b\\n\\xff')
        # one of ten connections stays open, both ends of it
        for (_, rate), times in zip((*connects, *accepts, *closes, *opened), (1, 1, 1.8, 0.2)):
            self.assertAlmostEqual(rate / known / times, 1, delta=0.05)
        self.assertEqual([value for _, value in (*lost, *errors)], [0, 0, 0])
        self.assertTrue(0 < time.time() - started < 60)
        self.assertEqual((tracer.stdout, list(file.parent.iterdir())), ("", []))
        self.promtool("check metrics", text)

    def promtool(self, command, text=""):
        result = subprocess.run(["promtool", *command.split()], input=text, capture_output=True, text=True)
        self.assertEqual((result.returncode, result.stderr), (0, ""), result.stdout)

    @live.by_timer
    def test_sessions(self):
        """tcplife's counters are in Prometheus what was done, under any name, and the file is gone in the end."""
        file, times = pathlib.Path("/var/lib/prometheus/node-exporter/tcplife.prom"), 12
        with socket.create_server(("127.0.0.1", 0)) as listener, live.Tracer(
                "tcplife", "--prometheus", file, "-i", "0.5", "--netns", "/proc/self/ns/net", "--existing") as tracer:
            workload.wait(workload.spawn("shop", None, serve, listener, times, 0.2), workload.spawn(
                "client", None, named, NAME, visit, listener.getsockname(), times, 100))

            def found(what, more=""):
                query = 'tcplife_%s{port="%d"%s}' % (what, listener.getsockname()[1], more)
                return {(metric["comm"], metric["role"]): value for metric, value in self.value(query)}
            client, server = ('a"b\\n\\xff', "connect"), ("shop", "accept")
            parts.until(lambda: found("sessions_total") == {client: times, server: times})
            for series, of_client, of_server in (
                    (["sent_bytes_total"], 100 * times, 0), (["received_bytes_total"], 0, 100 * times),
                    (["duration_seconds_bucket", ',le="0.1"'], 0, 0), (["duration_seconds_count"], times, times),
                    (["duration_seconds_bucket", ',le="+Inf"'], times, times), (["open"], 0, 0)):
                values = found(*series)
                self.assertEqual((values.pop(client), values.pop(server)), (of_client, of_server), series)
                self.assertEqual(set(values.values()) - {0}, set(), series)     # one that was open and not accepted yet
            seconds = found("duration_seconds_sum")
            for end in client, server:
                self.assertGreaterEqual(seconds[end], 0.2 * times - 0.01)
            self.assertEqual([value for _, value in self.value("tcplife_lost_total")], [0] * 5)
            self.assertEqual([value for _, value in self.value("node_textfile_scrape_error")], [0])
            text = file.read_text()
        self.assertEqual((tracer.stdout, list(file.parent.iterdir())), ("", []))
        self.promtool("check metrics", text)

    def test_alerts(self):
        for tool in "tcpchurn", "tcplife":
            self.promtool("check rules %s" % (parts.EXAMPLES / (tool + ".rules.yml")))
            self.promtool("test rules %s" % pathlib.Path(__file__).with_name(tool + ".test.yml"))
