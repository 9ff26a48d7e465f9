"""The Debian package of this tree in one release: the tests build on each other, in the order of their names."""
import gzip
import json
import os
import pathlib
import re
import subprocess
import time
import unittest

import deeptcptracer
import pexpect
import system

REPO = pathlib.Path(__file__).resolve().parents[2]
RELEASE = os.environ["RELEASE"]
TOOLS = ["tcplife", "tcpaccept", "tcpv4connect", "tcpchurn", "deeptcptracer"]
VERSION = re.search(r"(?m)^## \[([0-9.]+)\]", (REPO / "CHANGELOG.md").read_text()).group(1)
UNIT = "tcplife.service"
LOGS = "var/log/tcp-tracers"

# What the package manager, the journal and the tests themselves leave behind
OTHERS = re.compile(r"(dev|proc|run|sys|tmp|root|var/tmp|var/lib/(apt|dpkg)|var/cache/(apt|man|ldconfig)|var/log/apt"
                    r"|var/log/journal|var/lib/systemd/(catalog|timers|random-seed))(/|$)"
                    r"|etc/ld\.so\.cache$|var/log/(dpkg|alternatives)\.log$|var/lib/logrotate$")

# In the system: makes N sessions one after the other, in SECONDS; prints its PID and the clients' ports.
SESSIONS = """
import os, socket, sys, time
server, ports = socket.create_server(("127.0.0.1", 0)), []
for _ in range(int(sys.argv[1])):
    client = socket.create_connection(server.getsockname())
    accepted = server.accept()[0]
    ports.append(client.getsockname()[1])
    accepted.close()
    client.close()
    time.sleep(float(sys.argv[2]) / int(sys.argv[1]))
print(os.getpid(), *ports)
"""


def files(root):
    """Returns {path: mode} of all files below the root but those of OTHERS."""
    found = {}
    for folder, folders, names in os.walk(root):
        path = os.path.relpath(folder, root)
        folders[:] = [name for name in folders if not OTHERS.match(os.path.normpath(os.path.join(path, name)))]
        for name in folders + names:
            relative = os.path.normpath(os.path.join(path, name))
            if not OTHERS.match(relative):
                found[relative] = os.lstat(os.path.join(root, relative)).st_mode
    return found


class Shell:
    """An interactive bash with its completions, on a terminal."""

    def __init__(self, command):
        self.bash = pexpect.spawn(command[0], command[1:], encoding="utf-8", dimensions=(500, 200), timeout=20)
        self.bash.expect("[$#] $")
        for line in ("PS1='> '", "bind 'set enable-bracketed-paste off'", "bind 'set bell-style none'",
                     "bind 'set page-completions off'", "bind 'set completion-query-items -1'",
                     """bind -x '"\\C-g": echo "<$READLINE_LINE>"'""", ". /usr/share/bash-completion/bash_completion"):
            self.bash.sendline(line)
            self.bash.expect("\r\n(.*\r\n)*> $")

    def press(self, keys):
        for key in keys:
            self.bash.send(key)
        self.bash.send("\a")                        # see C-g above
        self.bash.expect("(?s)^(.*)<(.*)>\r\n")
        self.bash.send("\x15")                      # C-u: away with it
        return self.bash.match.groups()

    def complete(self, typed):
        """Returns what becomes of this after a Tab."""
        return self.press(typed + "\t")[1]

    def offers(self, typed):
        """Returns the words that a second Tab offers."""
        return set(self.press(typed + "\t\t")[0].partition("\r\n")[2].partition("\r\n> ")[0].split())

    def close(self):
        self.bash.close(force=True)


class Package(unittest.TestCase):
    maxDiff = None

    @classmethod
    def setUpClass(cls):
        cls.build = system.System(RELEASE, "build")
        cls.addClassCleanup(cls.build.close)
        cls.clean = system.System(RELEASE, "clean")
        cls.addClassCleanup(cls.clean.close)
        cls.clean.boot()
        cls.before = files(cls.clean.root)

    def systemctl(self, *command, check=True):
        return self.clean.run("systemctl", *command, check=check).strip()

    def lines(self):
        """Returns the lines of all of the service's files, decoded."""
        return [json.loads(line) for path in sorted((self.clean.root / LOGS).iterdir())
                for line in (gzip.open if path.suffix == ".gz" else open)(path, "rt")]

    def assert_seen(self, sessions):
        """Both ends of each of the sessions that SESSIONS has printed come to stand in the file, once."""
        pid, *ports = map(int, sessions.split())
        for _ in range(50):
            seen = sorted((line["lport"], line["rport"]) for line in self.lines() if line["pid"] == pid)
            if len(seen) >= 2 * len(ports):
                break
            time.sleep(0.1)
        server, = {port for pair in seen for port in pair} - set(ports) or {0}
        self.assertEqual(seen, sorted([(port, server) for port in ports] + [(server, port) for port in ports]))

    def until_traced(self):
        """Makes sessions until one is in the file."""
        for _ in range(50):
            pid = int(self.clean.run("python3", "-c", SESSIONS, "1", "0").split()[0])
            time.sleep(0.2)
            with_pid = (self.clean.root / LOGS).is_dir() and [line for line in self.lines() if line["pid"] == pid]
            if with_pid:
                return
        self.fail("no session in the file: " + self.clean.run("journalctl", "-u", UNIT, "--no-pager"))

    def test_1_built(self):
        """`make deb`, whose last step is lintian; and `make install` has the same files."""
        work = self.build.root / "root/tcp-tracers"
        work.mkdir()
        source = subprocess.Popen(["tar", "-c", "-C", REPO, "--exclude=./.git", "--exclude=./.venv",
                                   "--exclude=./build", "."], stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "-C", work], stdin=source.stdout, check=True)
        source.communicate()
        said = self.build.run("make", "-C", "/root/tcp-tracers", "-s", "deb")
        self.assertNotRegex(said, "(?m)^[EW]: ")
        deb = "build/tcp-tracers_%s_all.deb" % VERSION
        (self.clean.root / "root/tcp-tracers.deb").write_bytes((work / deb).read_bytes())

        self.build.run("make", "-C", "/root/tcp-tracers", "-s", "install", "PREFIX=/usr", "DESTDIR=/root/installed")
        self.build.run("dpkg-deb", "-x", "/root/tcp-tracers/" + deb, "/root/package")
        packaged = {re.sub(r"^lib/|[.]gz$", lambda part: "usr/lib/" if part.group() == "lib/" else "", path)
                    for path, mode in files(self.build.root / "root/package").items() if path not in ("lib", "usr/lib")}
        installed = set(files(self.build.root / "root/installed")) - {"usr/lib"}
        debians_own = {"usr/share/doc/tcp-tracers/changelog", "usr/share/doc/tcp-tracers/copyright",
                       "usr/share/python3", "usr/share/python3/runtime.d",
                       "usr/share/python3/runtime.d/tcp-tracers.rtupdate"}
        self.assertEqual(sorted(packaged), sorted(installed | debians_own))
        self.assertEqual([path for path in packaged if re.search("s?bin/.*[.]py$", path)], [])
        for tool in TOOLS:
            self.assertIn("%s %s\n" % (tool, VERSION), self.build.run("/root/installed/usr/sbin/" + tool, "--version"))
        self.build.run("make", "-C", "/root/tcp-tracers", "-s", "uninstall", "PREFIX=/usr", "DESTDIR=/root/installed")
        self.assertEqual([path for path in files(self.build.root / "root/installed") if "tcp" in path], [])

    def test_2_installed(self):
        self.clean.run("apt-get", "install", "-qq", "--no-install-recommends", "/root/tcp-tracers.deb")
        self.assertEqual(self.systemctl("is-enabled", UNIT, check=False), "disabled")
        self.assertEqual(self.systemctl("is-active", UNIT, check=False), "inactive")
        self.clean.run("mandb", "--quiet")
        found = self.clean.run("man", "-k", "tcp")
        for page in [tool + " (8)" for tool in TOOLS] + ["tcp-tracers (7)"]:
            self.assertRegex(found, "(?m)^%s +- " % re.escape(page))
        for page in [*TOOLS, "tcp-tracers", "btfheaders"]:
            self.assertIn("tcp-tracers " + VERSION, self.clean.run("man", page).splitlines()[-1])
        for tool in TOOLS:
            with self.subTest(tool=tool):
                self.assertEqual(self.clean.run(tool, "--version"), "%s %s\n" % (tool, VERSION))
                self.clean.run(tool, "--duration", "0.3", *["1"] * (tool == "tcpchurn"))
        self.assertIn("struct tcp_sock {", self.clean.run("btfheaders", "-t", "tcp_sock"))

    def test_3_service(self):
        netns = os.stat("/proc/%s/ns/net" % self.clean.init[0]).st_ino
        default = self.clean.root / "etc/default/tcplife"
        default.write_text("OPTIONS=--netns %d\n" % netns)          # not what others do on this machine meanwhile
        self.addCleanup(default.unlink)
        self.systemctl("enable", "--now", UNIT)
        self.until_traced()
        self.assert_seen(self.clean.run("python3", "-c", SESSIONS, "20", "0"))
        self.assertEqual((self.clean.root / LOGS / "tcplife.json").stat().st_mode & 0o777, 0o640)
        self.clean.run("systemd-analyze", "security", "--no-pager", "--threshold=15", UNIT)

        with self.subTest("rotation loses none"):
            load = subprocess.Popen(self.clean.command("python3", "-c", SESSIONS, "3000", "3"), text=True,
                                    stdout=subprocess.PIPE)
            for _ in range(4):
                time.sleep(0.5)
                self.clean.run("logrotate", "--force", "/etc/logrotate.d/tcp-tracers")
            self.assert_seen(load.communicate()[0])
            names = sorted(path.name for path in (self.clean.root / LOGS).iterdir())
            self.assertEqual(names, ["tcplife.json", "tcplife.json.1"] + ["tcplife.json.%d.gz" % n for n in (2, 3, 4)])

        with self.subTest("stop and restart are clean"):
            sessions = self.clean.run("python3", "-c", SESSIONS, "20", "0")
            self.systemctl("stop", UNIT)
            self.assert_seen(sessions)
            self.assertEqual(self.systemctl("show", "-P", "Result", UNIT), "success")
            self.assertEqual(self.systemctl("show", "-P", "ExecMainStatus", UNIT), "0")
            self.systemctl("start", UNIT)
            self.until_traced()
            self.systemctl("restart", UNIT)
            self.until_traced()
            self.assert_seen(self.clean.run("python3", "-c", SESSIONS, "20", "0"))

        with self.subTest("a crash is restarted"):
            self.systemctl("kill", "--signal=KILL", UNIT)
            self.until_traced()
            self.assertEqual(self.systemctl("show", "-P", "NRestarts", UNIT), "1")

        with self.subTest("an upgrade restarts it"):
            before = self.systemctl("show", "-P", "MainPID", UNIT)
            self.clean.run("apt-get", "install", "-qq", "--reinstall", "/root/tcp-tracers.deb")
            self.assertNotEqual(self.systemctl("show", "-P", "MainPID", UNIT), before)
            self.until_traced()
        said = self.clean.run("journalctl", "-u", UNIT, "-o", "cat", "--no-pager")
        self.assertNotRegex(said, "(?m)Traceback|^tcplife: ")

        with self.subTest("messages are in the journal"):
            options = default.read_text()
            default.write_text("OPTIONS=--nosuch\n")
            self.systemctl("restart", UNIT)
            for _ in range(50):
                if self.systemctl("is-active", UNIT, check=False) == "failed":      # and is not tried again
                    break
                time.sleep(0.2)
            self.assertEqual(self.systemctl("show", "-P", "ExecMainStatus", UNIT), "2")
            self.assertIn("\ntcplife: error: unrecognized arguments: --nosuch\n",
                          self.clean.run("journalctl", "-u", UNIT, "-o", "cat", "--no-pager"))
            default.write_text(options)
            self.systemctl("restart", UNIT)
            self.until_traced()

    def test_4_completion(self):
        """In a real bash, whose PATH does not have the tools: as where sudo is typed before."""
        (self.clean.root / "run/netns").mkdir(exist_ok=True)
        self.clean.run("ip", "netns", "add", "blue")
        self.addCleanup(self.clean.run, "ip", "netns", "del", "blue")
        self.clean.run("mkdir", "/root/maps")
        shell = Shell(self.clean.command("env", "PATH=/usr/bin:/bin", "HOME=/root", "bash", "--norc", "-i"))
        self.addCleanup(shell.close)
        for typed, completed in (
                ("tcplife --ow", "tcplife --owner "),
                ("tcplife --owner c", "tcplife --owner close "),
                ("tcplife --owner=a", "tcplife --owner=accept "),
                ("/usr/sbin/tcplife --js", "/usr/sbin/tcplife --json "),
                ("tcpaccept --no-k", "tcpaccept --no-kprobe "),
                ("tcpaccept --mntnsmap /root/m", "tcpaccept --mntnsmap /root/maps/"),
                ("tcpv4connect --netns b", "tcpv4connect --netns blue "),
                ("deeptcptracer -N ", "deeptcptracer -N blue "),
                ("deeptcptracer -e sock", "deeptcptracer -e sock_def_error_report"),
                ("deeptcptracer -e tcp_reset,tcp_send_r", "deeptcptracer -e tcp_reset,tcp_send_reset"),
                ("deeptcptracer --events=tcp_reset,tcp_retransmit_sk",
                 "deeptcptracer --events=tcp_reset,tcp_retransmit_skb"),
                ("tcplife -L ", "tcplife -L "),
                ("tcpchurn -i ", "tcpchurn -i ")):
            with self.subTest(typed=typed):
                self.assertEqual(shell.complete(typed), completed)
        events = {event.partition("(")[0] for event in deeptcptracer.EVENT_NAMES}
        self.assertEqual(shell.offers("deeptcptracer -e "), events)
        for typed in "tcplife -p ", "tcplife -Tp ", "tcpaccept --pid ", "tcpchurn ", "tcpchurn -w 1 5 ":
            with self.subTest(typed=typed):
                self.assertIn("1", shell.offers(typed))
        for tool in TOOLS:
            with self.subTest(tool=tool):
                options = self.clean.run(tool, "--help").partition("\noptions:")[2].partition("\nexamples:")[0]
                known = set(re.findall(r"(?<![^ ,])--?[\w-]+", options))
                self.assertEqual(shell.offers(tool + " -"), known)

    def test_9_removed(self):
        """While the service runs."""
        self.assertEqual(self.systemctl("is-active", UNIT, check=False), "active")
        self.clean.run("apt-get", "purge", "-qq", "tcp-tracers")
        self.clean.run("apt-get", "autoremove", "--purge", "-qq")
        self.assertEqual(self.systemctl("is-active", UNIT, check=False), "inactive")
        after = files(self.clean.root)
        self.assertEqual(sorted(set(after) ^ set(self.before)), [])
