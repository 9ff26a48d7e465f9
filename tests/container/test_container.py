"""The image of examples/container, built and run as its README says, and its pod, both on podman."""
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import tempfile
import time
import unittest

import live

FOLDER = live.ROOT / "examples/container"
POD = FOLDER / "pod.yaml"
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache", "tcp-tracers")
BASE = CACHE / "container-trixie.tar"
VALIDATE = str(live.ROOT / ".venv/bin/kubernetes-validate")
START = 60 * live.SLOW   # seconds that a tool in a container may take until it traces

# For each number on its input: makes so many sessions; prints its network namespace and the ports, the server's first.
SESSIONS = """
import os, socket, sys
server = socket.create_server(("127.0.0.1", 0))
for line in sys.stdin:
    ports = []
    for _ in range(int(line)):
        client = socket.create_connection(server.getsockname())
        accepted = server.accept()[0]
        ports.append(client.getsockname()[1])
        accepted.close()
        client.close()
    print(os.stat("/proc/self/ns/net").st_ino, server.getsockname()[1], *ports, flush=True)
"""

# Storage of its own; the runtime and the limits that work on machines with hybrid cgroups or without CAP_SYS_RESOURCE.
CONTAINERS = """
[containers]
netns = "host"
default_ulimits = ["nofile=20000:20000", "nproc=10000:10000"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
tmp_dir = "{0}/tmp"
"""
STORAGE = """
[storage]
driver = "overlay"
graphroot = "{0}/storage"
runroot = "{0}/run"
"""


def base():
    """Returns an image like debian:trixie-slim, made by mmdebstrap if it is not in the cache."""
    if not BASE.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        part = BASE.with_suffix(".part.tar")
        hook = '--customize-hook=apt-config dump Acquire >"$1/etc/apt/apt.conf.d/99host"'
        subprocess.run(["mmdebstrap", "--quiet", "--variant=minbase", hook, "trixie", part], check=True)
        part.rename(BASE)
    return BASE


def commands(start):
    """Returns the commands of the README that start like this pattern, each on one line."""
    text = (FOLDER / "README.md").read_text().replace("\\\n", "")
    return [" ".join(line.split()) for line in re.findall("(?m)^    (%s.*)$" % start, text)]


class Container(unittest.TestCase):
    maxDiff = None

    @classmethod
    def setUpClass(cls):
        cls.folder = pathlib.Path(tempfile.mkdtemp(prefix="tcpt-container-"))
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        (cls.folder / "containers.conf").write_text(CONTAINERS.format(cls.folder))
        (cls.folder / "storage.conf").write_text(STORAGE.format(cls.folder))
        cls.env = {**os.environ, "CONTAINERS_CONF": str(cls.folder / "containers.conf"),
                   "CONTAINERS_STORAGE_CONF": str(cls.folder / "storage.conf")}
        cls.addClassCleanup(cls.podman, "rm --all --force --time=0")
        cls.podman("import %s docker.io/library/debian:trixie-slim" % base())
        build, = commands("podman build")
        cls.podman(build[len("podman "):])

    @classmethod
    def sh(cls, command, **env):
        """Returns status, output and errors of a shell command, in the folder for which the README is written."""
        done = subprocess.run(["sh", "-c", command], text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, cwd=live.ROOT, env={**cls.env, **env}, timeout=600)
        return done.returncode, done.stdout, done.stderr

    @classmethod
    def podman(cls, arguments, **env):
        """Returns what it printed; fails if it does."""
        status, out, err = cls.sh("podman " + arguments, **env)
        assert status == 0, "podman %s: exit status %d:\n%s" % (arguments, status, err)
        return out.strip()

    def start(self, command):
        """Returns a process that runs this command. read() is what it has printed up to now."""
        out, err = (tempfile.NamedTemporaryFile("r", dir=self.folder) for _ in range(2))
        process = subprocess.Popen(["sh", "-c", "exec " + command], stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                                   cwd=live.ROOT, env=self.env)
        self.addCleanup(process.kill)
        process.read, process.errors = (pathlib.Path(file.name).read_text for file in (out, err))
        process.files = out, err                # they go with it
        return process

    def stop(self, process):
        """Returns what a tool has printed that was silent on standard error."""
        process.send_signal(signal.SIGINT)
        status = process.wait(START)
        self.assertEqual((status, process.errors()), (0, ""))
        return process.read()

    def client(self, name=None):
        """Returns a process that makes sessions: on the host, or in a container of this name. pid: the host's."""
        container = "podman run --interactive --rm --network=none --name=%s tcp-tracers" % name
        command = [*(container.split() if name else ()), "python3", "-c", SESSIONS]
        client = subprocess.Popen(command, env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.addCleanup(client.communicate)     # closes its input, so that it ends

        def sessions(number):
            """Makes sessions. Returns the ends of all: (local port, remote port)."""
            print(number, file=client.stdin, flush=True)
            client.netns, port, *ports = map(int, client.stdout.readline().split())
            return sorted([(port, other) for other in ports] + [(other, port) for other in ports])
        client.sessions = sessions
        sessions(0)
        if name:
            client.pid = int(self.podman("inspect --format '{{.State.Pid}}' " + name))
        return client

    def until(self, are_seen, client):
        """Makes sessions until they are seen."""
        give_up = time.monotonic() + START
        while not are_seen():
            self.assertLess(time.monotonic(), give_up, "no session is seen")
            client.sessions(1)
            live.settle(0.3)

    def assert_seen(self, lines, sessions):
        """Each end of these is one line, with the host's PID of its process. sessions: {client: ends}"""
        for client, ends in sessions.items():
            mine = [line for line in lines if line["pid"] == client.pid]
            self.assertEqual(sorted((line["lport"], line["rport"]) for line in mine), ends)
            self.assertEqual({(line["comm"], line["netns"]) for line in mine}, {("python3", client.netns)})
            self.assertNotIn(None, [line["cgroup"] for line in mine])

    def test_image(self):
        """It is as small as the README says, and has no lists of packages."""
        said = int(re.search(r"(\d+) MB as `podman images`", (FOLDER / "README.md").read_text())[1])
        size = int(self.podman("image inspect --format '{{.Size}}' tcp-tracers")) / 1e6
        self.assertLess(abs(size - said), 0.1 * said)
        self.assertEqual(self.podman("run --rm --network=none tcp-tracers find /var/lib/apt/lists /tmp /var/cache/apt "
                                     "-type f -size +0"), "")

    def test_on_a_host(self):
        """The line of the README; the same with JSON; and with CAP_SYS_ADMIN and less of the rest."""
        line, = commands("podman run")
        self.assertTrue(line.endswith(" tcp-tracers tcplife -x"), line)
        table, objects = self.start(line), self.start(line.replace(" -x", " --json --existing"))
        admin = line.replace("--security-opt=seccomp=unconfined", "--cap-add=SYS_ADMIN")
        admin = self.start(admin.replace("--volume=/sys/kernel/tracing:/sys/kernel/tracing:ro", "").replace(
            " -x", " --json"))
        host, shop, other = self.client(), self.client("shop"), self.client()
        self.until(lambda: re.search("(?m)^%d " % other.pid, table.read()) and
                   all('"pid":%d,' % other.pid in tracer.read() for tracer in (objects, admin)), other)
        sessions = {client: client.sessions(20) for client in (host, shop)}
        self.assertNotEqual(host.netns, shop.netns)
        live.settle(1)
        for tracer in objects, admin:
            self.assert_seen(list(map(live.strict_json, self.stop(tracer).splitlines())), sessions)
        rows = [row.split() for row in self.stop(table).splitlines()]
        for client, ends in sessions.items():
            mine = [row for row in rows if row[:2] == [str(client.pid), "python3"]]
            self.assertEqual(sorted((int(row[3]), int(row[5])) for row in mine), ends)

    def test_on_a_node(self):
        """The pod, on podman, whose version 4.3 takes neither hostPID nor seccompProfile from it."""
        subprocess.run([VALIDATE, "--strict", "--quiet", POD], check=True)
        text = POD.read_text()
        self.assertIn("\n  hostPID: true\n", text)
        self.assertIn("\n        seccompProfile:\n          type: Unconfined\n", text)
        pod, conf = self.folder / "pod.yaml", self.folder / "pod.conf"
        annotation = "  annotations:\n    seccomp.security.alpha.kubernetes.io/pod: unconfined"
        pod.write_text(text.replace("\nmetadata:\n", "\nmetadata:\n%s\n" % annotation))
        conf.write_text((self.folder / "containers.conf").read_text().replace("[containers]",
                                                                              '[containers]\npidns = "host"'))
        self.addCleanup(self.podman, "kube down %s" % pod)
        self.podman("kube play --network=none %s" % pod, CONTAINERS_CONF=str(conf))
        name = "tcp-tracers-tcplife"
        wanted = ["CAP_" + capability for capability in re.search(r"add: \[(.*)\]", text)[1].split(", ")]
        self.assertEqual(sorted(self.podman("inspect --format '{{.EffectiveCaps}}' " + name)[1:-1].split()),
                         sorted(wanted))
        host, shop, other = self.client(), self.client("shop"), self.client()
        self.until(lambda: '"pid":%d,' % other.pid in self.podman("logs " + name), other)
        sessions = {client: client.sessions(20) for client in (host, shop)}
        live.settle(1)
        status, out, err = self.sh("podman logs " + name)
        self.assertEqual((status, err), (0, ""))
        self.assert_seen(list(map(live.strict_json, out.splitlines())), sessions)

    def test_one_container(self):
        """--netns of a container, given on the host and in a container, and the way back."""
        shop, line, = self.client("shop"), *commands("podman run")
        here, = commands("tcplife -x --netns .*podman inspect")
        option = " --json" + here[len("tcplife -x"):]
        tracers = [self.start(line.replace(" -x", option)), self.start(str(live.ROOT / "tcplife") + option)]
        self.until(lambda: all(tracer.read() for tracer in tracers), shop)
        for tracer in tracers:
            lines = list(map(live.strict_json, self.stop(tracer).splitlines()))
            self.assertEqual({(line["netns"], line["pid"]) for line in lines}, {(shop.netns, shop.pid)})
        self.assertEqual({line["cgroup"][-64:] for line in lines}, {self.podman("inspect --format '{{.Id}}' shop")})
        back, = re.findall("`(lsns [^`]*)`", (FOLDER / "README.md").read_text())
        self.assertRegex(self.sh(back)[1], r"(?m)^ *%d +net +\d+ +%d " % (shop.netns, shop.pid))
        hidden = self.start(line.replace("--pid=host", "").replace(" -x", " --json --netns %d" % shop.netns))
        self.until(hidden.read, shop)
        self.assertEqual({json.loads(line)["pid"] for line in self.stop(hidden).splitlines()}, {None})

    def test_what_is_missing(self):
        """One line says so."""
        line, = commands("podman run")
        line = line.replace(" -x", " --duration 1")
        for command, message in (
                ("podman run --rm --network=none tcp-tracers tcplife", "needs root, or .*capabilities"),
                (line.replace("--cap-add=BPF", ""), "needs root, or .*capabilities"),
                (line.replace("--cap-add=PERFMON", ""), "needs root, or .*capabilities"),
                (line.replace("--security-opt=seccomp=unconfined", ""), "a seccomp filter forbids it"),
                (line.replace(" --duration", " --no-kprobe --duration").replace(
                    "--volume=/sys/kernel/tracing:/sys/kernel/tracing:ro", ""), "needs tracefs")):
            with self.subTest(command):
                status, out, err = self.sh(command)
                self.assertEqual((status, out), (1, ""))
                self.assertRegex(err, "^tcplife: cannot trace: .*%s.*\n$" % message)
