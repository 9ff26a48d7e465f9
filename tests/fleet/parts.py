"""The parts of the pipeline as processes of their own, with the configuration that the examples show."""
import contextlib
import ctypes
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request

import live

EXAMPLES = live.ROOT / "examples/fleet"
HOST = "web1"                   # what syslog-ng takes for the name of its machine
SHARDS = {"ch1": "10.99.0.1", "ch2": "10.99.0.2"}       # each in a network namespace of that name
CHDB = "/opt/chdb/bin/python"
# The user of tcplife.conf, as a server of 18.16 knows it
USER = """<users><tcplife><password>secret</password><networks><ip>::/0</ip></networks>
    <profile>default</profile><quota>default</quota></tcplife>"""


def until(true, seconds=30):
    """What true() returns once it is something."""
    give_up = time.monotonic() + seconds * live.SLOW
    while not (value := true()):
        assert time.monotonic() < give_up, "not within %d s: %s" % (seconds, true)
        time.sleep(0.1)
    return value


def get(url, data=None):
    """The text at this address."""
    try:
        with urllib.request.urlopen(url, data, timeout=60) as answer:       # noqa: S310
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode()) from None


class Daemon:
    """A process that runs from start() to stop()."""

    def __init__(self, name, *command, user=None):
        as_user = ["setpriv", "--reuid", user, "--regid", user, "--clear-groups"] if user else []
        self.name, self.command, self.process = name, [*as_user, *command], None

    def is_up(self):
        return True

    def start(self):
        with open("/var/log/%s.out" % self.name, "a") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, cwd="/")
        until(self.is_up)

    def stop(self, number=signal.SIGTERM):
        if self.process:
            self.process.send_signal(number)
            self.process.wait(30)
        self.process = None


class Web(Daemon):
    """A server with an address for HTTP."""

    def __init__(self, name, url, *command, user=None):
        super().__init__(name, *command, user=user)
        self.url = url

    def is_up(self):
        with contextlib.suppress(OSError, AssertionError):
            return get(self.url)


def statements(name):
    """The SQL statements of an example file."""
    text = re.sub("^--.*\n", "", (EXAMPLES / name).read_text(), flags=re.MULTILINE)
    return [statement.strip() for statement in text.split(";\n") if statement.strip()]


def old(name):
    """The text of an example file, in the way that tcplife.sql names for a server as old as Debian 12's."""
    way = re.search(r"^--     (sed .*) \| clickhouse-client -n$", (EXAMPLES / "tcplife.sql").read_text(), re.MULTILINE)
    command = way[1].replace("tcplife.sql", name)
    return subprocess.check_output(["sh", "-c", command], cwd=EXAMPLES, text=True)


class ClickHouse(Web):
    """A server, with the tables that the examples make."""

    def __init__(self, name):
        self.address, folder = SHARDS[name], pathlib.Path("/etc/clickhouse-server-" + name)
        config = pathlib.Path("/etc/clickhouse-server/config.xml").read_text()
        for before, after in (("<tcp_port>", "<listen_host>%s</listen_host><https_port>8443</https_port><tcp_port>" %
                               self.address),
                              ("<dhParamsFile>/etc/clickhouse-server/dhparam.pem</dhParamsFile>", ""),
                              ("/var/lib/clickhouse/", "/var/lib/clickhouse-%s/" % name),
                              ("/var/log/clickhouse-server/", "/var/log/clickhouse-server/%s-" % name)):
            config = config.replace(before, after)
        (folder / "config.d").mkdir(parents=True)
        (folder / "config.xml").write_text(config)
        users = pathlib.Path("/etc/clickhouse-server/users.xml").read_text()
        (folder / "users.xml").write_text(users.replace("<users>", USER))
        (folder / "config.d/shards.xml").write_bytes((EXAMPLES / "shards.xml").read_bytes())
        subprocess.run(["install", "-d", "-o", "clickhouse", "/var/lib/clickhouse-" + name], check=True)
        super().__init__(name, "http://%s:8123" % self.address, "clickhouse-server", "--config=%s/config.xml" % folder,
                         user="clickhouse")
        self.command[:0] = ["nsenter", "--net=/run/netns/" + name]

    def client(self, *arguments, stdin=""):
        return subprocess.run(["clickhouse-client", "--host", self.address, *arguments], input=stdin, text=True,
                              stdout=subprocess.PIPE, check=True).stdout

    def create(self):
        """What the examples create."""
        for name in "tcplife.sql", "minutes.sql", "shards.sql":
            self.client("-n", stdin=old(name))

    def post(self, sql, data=None, database="default"):
        query = {"query": sql, "database": database, "output_format_json_quote_64bit_integers": 0,
                 "input_format_skip_unknown_fields": 1}
        return get(self.url + "/?" + urllib.parse.urlencode(query), (data or "").encode())

    def rows(self, sql, database="default"):
        return [json.loads(line) for line in self.post(sql + " FORMAT JSONEachRow", database=database).splitlines()]


class SyslogNg(Daemon):
    """syslog-ng on a machine of this name, with Debian's first lines and our file."""

    def __init__(self):
        with open("/etc/syslog-ng/syslog-ng.conf") as debian:
            heading = [line for line in debian if line.startswith("@version") or "scl.conf" in line]
        path = pathlib.Path("/etc/syslog-ng/test.conf")
        path.write_text("".join(heading) + '@include "/etc/syslog-ng/conf.d/*.conf"\n'
                        'log { source { internal(); }; destination { file("/var/log/internal.log"); }; };\n')
        super().__init__("syslog-ng", "unshare", "--uts", "sh", "-c",
                         "hostname %s && exec syslog-ng -F -f %s" % (HOST, path))

    def configure(self, namespace="/proc/self/ns/net", servers=("clickhouse",)):
        """Our file, for the sessions in one network namespace: by default in this one, where nobody else has any."""
        text = (EXAMPLES / "tcplife.conf").read_text().replace("tcplife --json", "tcplife --json --netns " + namespace)
        text = re.sub(r'"https://clickhouse(.*)"', lambda url: " ".join(
            '"https://%s%s"' % (server, url[1]) for server in servers), text)
        pathlib.Path("/etc/syslog-ng/conf.d/tcplife.conf").write_text(text)

    @property
    def tcplife(self):
        """The PID of the tool that it has started; None if it does not trace yet."""
        children = subprocess.run(["pgrep", "-P", str(self.process.pid)], stdout=subprocess.PIPE, text=True).stdout
        for pid in map(int, children.split()):
            with contextlib.suppress(OSError), open("/proc/%d/syscall" % pid) as call:
                if call.read().startswith(live.SLEEPS):
                    return pid

    def is_up(self):
        return self.tcplife


def prepare():
    """A network namespace of our own, the servers' names and network, and the tools where make install puts them."""
    ctypes.CDLL(None).unshare(0x40000000)           # CLONE_NEWNET
    with open("/etc/hosts", "a") as hosts:
        hosts.write("127.0.0.1 localhost\n%s clickhouse ch1\n%s ch2\n" % tuple(SHARDS.values()))
    commands = ["link set lo up", "link add br0 type bridge", "addr add 10.99.0.3/24 dev br0", "link set br0 up"]
    for name, address in SHARDS.items():
        commands += ["netns add " + name, "link add %s type veth peer name veth0 netns %s" % (name, name),
                     "link set %s master br0 up" % name, "-n %s addr add %s/24 dev veth0" % (name, address),
                     "-n %s link set veth0 up" % name, "-n %s link set lo up" % name]
    for command in commands:
        subprocess.run(["ip", *command.split()], check=True)
    subprocess.run(["make", "-s", "install"], cwd=live.ROOT, check=True)
    os.makedirs("/var/lib/syslog-ng", exist_ok=True)
    make_certificate()


def make_certificate():
    """A certificate for the servers' names, which this machine trusts."""
    names = "subjectAltName=" + ",".join("DNS:" + name for name in ("clickhouse", *SHARDS))
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=clickhouse",
                    "-addext", names, "-keyout", "/etc/clickhouse-server/server.key",
                    "-out", "/etc/clickhouse-server/server.crt"], check=True, stderr=subprocess.DEVNULL)
    shutil.chown("/etc/clickhouse-server/server.key", "clickhouse")
    shutil.copy("/etc/clickhouse-server/server.crt", "/usr/local/share/ca-certificates/clickhouse.crt")
    subprocess.run(["update-ca-certificates"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
