"""What the pipeline costs: CPU of a machine that sends, and bytes of a session in ClickHouse.

tcplife and syslog-ng at 1,000 and 10,000 connections per second, each of two sessions as both ends are here; then the
sessions seen, 100,000 of them, as they are and as those of a mixed load: clients, ports, bytes and times at random.
"""
import json
import os
import pathlib
import random
import time

import live
import parts

SECONDS = 10
ROWS = 100000
TICK = os.sysconf("SC_CLK_TCK")


def cpu(pid):
    """Seconds of CPU that the process has used."""
    with open("/proc/%d/stat" % pid) as stat:
        return sum(map(int, stat.read().rpartition(")")[2].split()[11:13])) / TICK


def mixed(line):
    """The session as one of an application."""
    session = json.loads(line)
    ports = ["lport", "rport"] if session["role"] == "accept" else ["rport", "lport"]
    session.update(zip(ports, (random.choice([80, 443, 5432, 6379, 8080]), random.randrange(32768, 60999))))
    session.update(pid=random.randrange(500, 540), comm=random.choice(["nginx", "shop", "postgres", "redis-server"]),
                   raddr="10.30.%d.%d" % (random.randrange(4), random.randrange(256)), ms=random.lognormvariate(2, 1.5),
                   tx_bytes=int(random.lognormvariate(6, 2)), rx_bytes=int(random.lognormvariate(8, 2)),
                   srtt_us=int(random.lognormvariate(6, 1)), end=random.choice(["local", "local", "remote", "reset"]))
    return json.dumps(session, separators=(",", ":"))


def store(server, name, lines):
    """Print what these lines take in the table, and their minutes."""
    for table in "tcplife", "tcplife_minutes":
        server.post("TRUNCATE TABLE " + ("`.inner.%s`" % table if "minutes" in table else table))
    began = time.monotonic()
    server.post("INSERT INTO tcplife FORMAT JSONEachRow", "\n".join(lines))
    took = time.monotonic() - began
    print("%s: %d lines of %d bytes, stored in %.2f s" % (name, len(lines), len("\n".join(lines)) / len(lines), took))
    for table in "tcplife", ".inner.tcplife_minutes":
        server.post("OPTIMIZE TABLE `%s` FINAL" % table)
        size, = server.rows("SELECT sum(rows) AS rows, sum(bytes) AS bytes FROM system.parts "
                            "WHERE active AND table = '%s' AND database = 'default'" % table)
        print("%s: %s: %d rows of %.1f bytes" % (name, table, size["rows"], size["bytes"] / size["rows"]))


def main():
    parts.prepare()
    server, collector = parts.ClickHouse("ch1"), parts.SyslogNg()
    server.start()
    server.create()
    collector.configure()
    collector.start()
    load = live.Load()
    try:
        for rate in 1000, 10000:
            pids = [parts.until(collector.is_up), collector.process.pid]
            before = list(map(cpu, pids))
            reached = load.run(rate * SECONDS // 2, 2, rate)
            time.sleep(3)           # until all has been sent
            used = [100 * (cpu(pid) - was) / SECONDS for pid, was in zip(pids, before)]
            print("%d connections per second (%.0f reached): tcplife %.1f %%, syslog-ng %.1f %% of a CPU" % (
                rate, reached, *used))
        lines = server.post("SELECT * FROM tcplife LIMIT %d FORMAT JSONEachRow" % ROWS).splitlines()
        server.stop()
        queue = max(pathlib.Path("/var/lib/syslog-ng").glob("*.rqf"), key=lambda path: path.stat().st_size)
        empty = queue.stat().st_size
        load.run(ROWS // 4, 2)
        time.sleep(3)
        print("a session that waits takes %.0f bytes on disk" % ((queue.stat().st_size - empty) / ROWS))
        collector.stop()
        server.start()
        random.seed(1)
        store(server, "as seen", lines)
        store(server, "mixed", list(map(mixed, lines)))
    finally:
        collector.stop()
        server.stop()


if __name__ == "__main__":
    main()
