"""The Debian package of this tree in one release, and `make install`.

The tests build on each other, in the order of their names.
"""
import gzip
import json
import os
import pathlib
import re
import stat
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
# In the system: holds the locks of apt, as unattended-upgrades does.
LOCKS = """
import fcntl, time
files = [open(path, "a") for path in ("/var/lib/apt/lists/lock", "/var/lib/dpkg/lock-frontend")]
for file in files:
    fcntl.lockf(file, fcntl.LOCK_EX)
print(flush=True)
time.sleep(3)
"""


def indented(path, start):
    """Returns the indented line of a text that starts so: a command that readers are asked to type."""
    return re.search("(?m)^(?:# )?    (%s.*)$" % re.escape(start), (REPO / path).read_text()).group(1)


def copy_tree(root, name):
    """Copies what a clone has to /root/NAME there. Returns its path."""
    work = root / "root" / name
    work.mkdir()
    source = subprocess.Popen(["tar", "-c", "-C", REPO, "--exclude=./.git", "--exclude=./.venv", "--exclude=./build",
                               "--exclude=__pycache__", "."], stdout=subprocess.PIPE)
    subprocess.run(["tar", "-x", "-C", work], stdin=source.stdout, check=True)
    source.communicate()
    return work


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
    """An interactive shell with its completions, on a terminal. C-g shows the line that is typed."""

    BASH = ("bind 'set enable-bracketed-paste off'", "bind 'set bell-style none'", "bind 'set page-completions off'",
            "bind 'set completion-query-items -1'", """bind -x '"\\C-g": echo "<$READLINE_LINE>"'""",
            ". /usr/share/bash-completion/bash_completion")
    ZSH = ("unset zle_bracketed_paste; unsetopt beep prompt_cr; LISTMAX=1000", "autoload -U compinit && compinit -u",
           """show() { zle -I; echo "<$BUFFER>"; }; zle -N show; bindkey '^G' show""")

    def __init__(self, command, lines):
        self.pty = pexpect.spawn(command[0], command[1:], encoding="utf-8", dimensions=(500, 200), timeout=20)
        self.pty.expect("[$#%] (\x1b[^>]*)?$")
        for line in ("PS1='> '", *lines):
            self.run(line)

    def run(self, line):
        """Returns what the shell has printed when it prompts again."""
        self.pty.sendline(line)
        self.pty.expect("(?s)\n(.*)> (\x1b[^>]*)?$")
        return self.pty.match[1]

    def press(self, keys):
        for key in keys:
            self.pty.send(key)
        self.pty.send("\a")                         # see C-g above
        self.pty.expect("(?s)^(.*)<([^\r\n]*)>\r\n")
        self.pty.send("\x15")                       # C-u: away with it
        return self.pty.match.groups()

    def complete(self, typed):
        """Returns what becomes of this after a Tab."""
        return self.press(typed + "\t")[1]

    def offers(self, typed):
        """Returns the words that a second Tab offers."""
        return set(self.press(typed + "\t\t")[0].partition("\r\n")[2].partition("\r\n> ")[0].split())

    def close(self):
        self.pty.close(force=True)


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
        """`make deb`, whose last step is lintian. `make install` has the same files. dpkg-buildpackage works alone."""
        work = copy_tree(self.build.root, "tcp-tracers")
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

        clone = copy_tree(self.build.root, "clone")
        before = files(clone)
        self.build.run("env", "-C", "/root/clone", "dpkg-buildpackage", "--no-sign", "--no-check-builddeps")
        self.assertTrue((self.build.root / ("root/tcp-tracers_%s.dsc" % VERSION)).exists())
        self.build.run("env", "-C", "/root/clone", "debian/rules", "clean")
        self.assertEqual(set(files(clone)) ^ set(before), set())

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
        (self.clean.root / "root/autopkgtest").write_bytes((REPO / "debian/tests/tools").read_bytes())
        self.clean.run("env", "AUTOPKGTEST_TMP=/root", "sh", "/root/autopkgtest")

    def test_3_reads_only(self):
        """As SECURITY.md has it: a tool starts no program, opens no network connection and no file to write.

        But for kprobe_events, and files in a directory that only the child which compiles can see.
        """
        for tool in TOOLS:
            with self.subTest(tool=tool):
                self.clean.run("env", "HOME=/", "strace", "-f", "-o", "/root/calls", "-e",    # or Python looks for it
                               "execve,openat,open,creat,rename,%network",
                               tool, "--duration", "0.3", *["1"] * (tool == "tcpchurn"))
                calls = (self.clean.root / "root/calls").read_text()
                self.assertEqual(calls.count("execve("), 1)
                self.assertNotRegex(calls, r"\b(socket|connect|bind)\(")
                written = re.findall(r'"(.*)", (?:O_WRONLY|O_RDWR|.*O_CREAT)', calls)
                self.assertGreater(len(written), 10)
                self.assertEqual([path for path in written
                                  if not re.match("/proc/bus/|/sys/kernel/(debug/)?tracing/kprobe_events$", path)], [])

    def test_3_without_root(self):
        """The command in SECURITY.md, with each tool: its user is not root, and it has these capabilities only."""
        command = indented("SECURITY.md", "sudo systemd-run ")
        netns = " --netns %d" % os.stat("/proc/%s/ns/net" % self.clean.init[0]).st_ino
        capabilities = {"CAP_BPF": 39, "CAP_PERFMON": 38, "CAP_DAC_READ_SEARCH": 2, "CAP_SYS_PTRACE": 19}
        shell = Shell(self.clean.command("bash", "--norc", "-i"), ('sudo() { "$@"; }', *Shell.BASH[:1]))
        self.addCleanup(shell.close)
        shell.pty.sendline(command + netns)
        shell.pty.expect("\nPID ")
        status = self.clean.run("sh", "-c", "cat $(grep -lx tcplife /proc/[0-9]*/comm | sed 's/comm$/status/')")
        self.assertNotRegex(status, r"(?m)^Uid:.*\b0\b")
        self.assertIn("\nCapEff:\t%016x\n" % sum(1 << capabilities[name] for name in re.findall(r"CAP_\w+", command)),
                      status)
        pid = self.clean.run("python3", "-c", SESSIONS, "1", "0").split()[0]
        shell.pty.expect(r"\n%s +python3 " % pid)
        shell.pty.sendintr()
        shell.pty.expect("> $")
        for tool in TOOLS:
            with self.subTest(tool=tool):
                said = shell.run(re.sub(r"\btcplife\b", tool, command) + netns + " --duration 0.3" +
                                 " 1" * (tool == "tcpchurn") + "; echo status $?")
                self.assertTrue(said.endswith("status 0\r\n"), said)

    def test_4_service(self):
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

    def test_5_completion(self):
        """In a real bash and a real zsh, whose PATH does not have the tools: as where sudo is typed before."""
        (self.clean.root / "run/netns").mkdir(exist_ok=True)
        self.clean.run("ip", "netns", "add", "blue")
        self.addCleanup(self.clean.run, "ip", "netns", "del", "blue")
        self.clean.run("mkdir", "/root/maps")
        user = ["env", "PATH=/usr/bin:/bin", "HOME=/root"]
        shell = Shell(self.clean.command(*user, "bash", "--norc", "-i"), Shell.BASH)
        self.addCleanup(shell.close)
        zsh = Shell(self.clean.command(*user, "zsh", "-f", "-i"),
                    (*Shell.ZSH, indented("completion/tcp-tracers.bash", "autoload ")))
        self.addCleanup(zsh.close)
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
                self.assertEqual(zsh.complete(typed).rstrip(), completed.rstrip("/ "))
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

    def test_8_removed(self):
        """While the service runs."""
        self.assertEqual(self.systemctl("is-active", UNIT, check=False), "active")
        self.clean.run("apt-get", "purge", "-qq", "tcp-tracers")
        self.clean.run("apt-get", "autoremove", "--purge", "-qq")
        self.assertEqual(self.systemctl("is-active", UNIT, check=False), "inactive")
        after = files(self.clean.root)
        self.assertEqual(sorted(set(after) ^ set(self.before)), [])

    def test_9_make_install(self):
        """Below /usr/local, with the service; what it needs is installed while another program holds apt's locks."""
        copy_tree(self.clean.root, "tcp-tracers")
        locks = subprocess.Popen(self.clean.command("python3", "-c", LOCKS), stdout=subprocess.PIPE)
        locks.stdout.readline()
        said = self.clean.run("sh", "/root/tcp-tracers/tests/setup/packages.sh", "demo")
        self.assertEqual(locks.wait(), 0)
        self.assertIn("waiting for another program", said)

        before = files(self.clean.root)
        make = ["make", "-C", "/root/tcp-tracers", "-s"]
        self.clean.run(*make, "install")
        self.systemctl("enable", "--now", UNIT)
        self.until_traced()
        self.clean.run(*make, "uninstall")
        self.assertEqual(self.systemctl("is-active", UNIT, check=False), "inactive")
        self.assertEqual(self.systemctl("show", "-P", "LoadState", UNIT), "not-found")
        after = {path: mode for path, mode in files(self.clean.root).items() if not path.startswith(LOGS)}
        self.assertEqual([path for path in after if path not in before and not stat.S_ISDIR(after[path])], [])
