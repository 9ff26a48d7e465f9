"""Minimal Debian systems, to build the package in and to install it in."""
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import time
import zlib

CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache", "tcp-tracers")
# What they have, and what they have downloaded but not installed. There is no network in them.
KINDS = {
    "build": ("make,debhelper,dh-python,lintian", ""),
    "clean": ("systemd-sysv,logrotate,man-db,bash-completion,dbus,zsh,make,strace,iproute2,python3", "python3-bpfcc"),
}


def base(release, kind):
    """Returns the folder of such a system, made by mmdebstrap if it is not in the cache."""
    packages, downloaded = KINDS[kind]
    name = "package-%s-%s" % (kind, release)
    path = CACHE / ("%s-%08x" % (name, zlib.crc32(repr(KINDS[kind]).encode())))
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        for old in CACHE.glob(name + "*"):
            shutil.rmtree(old)
        part = path.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        download = "APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-get -qq -y --no-install-recommends --download-only install "
        hook = ["--customize-hook=" + download + downloaded] if downloaded else []
        subprocess.run(["mmdebstrap", "--quiet", "--variant=apt", "--include=" + packages, "--skip=cleanup/apt", *hook,
                        release, part], check=True)
        part.rename(path)
    return path


class System:
    """One of them, whose changes are in memory only. boot() starts its systemd in a container with all capabilities."""

    def __init__(self, release, kind):
        self.name = "tcpt-%s-%d" % (kind, os.getpid())
        self.init = self.nspawn = None
        self.memory = pathlib.Path(tempfile.mkdtemp(prefix=self.name))
        self.root = self.memory / "root"
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", self.memory], check=True)
        for folder in "root", "upper", "work":
            (self.memory / folder).mkdir()
        subprocess.run(["mount", "-t", "overlay", "overlay", self.root, "-o", "lowerdir=%s,upperdir=%s,workdir=%s" % (
            base(release, kind), self.memory / "upper", self.memory / "work")], check=True)

    def container(self, *options):
        return ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--private-network", "--pipe",
                "--link-journal=no", "--resolv-conf=off", "--timezone=off", "--machine=" + self.name,
                "--directory=%s" % self.root, *options]

    def boot(self):
        self.nspawn = subprocess.Popen(
            self.container("--boot", "--capability=all", "--system-call-filter=bpf perf_event_open"),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"})
        children = pathlib.Path("/proc/%d/task/%d/children" % (self.nspawn.pid, self.nspawn.pid))
        for _ in range(600):
            time.sleep(0.1)
            self.init = children.read_text().split()[:1]
            if self.init and self.run("systemctl", "is-system-running", check=False).strip() in ("running", "degraded"):
                break
        else:
            raise AssertionError("the system has not booted in a minute")
        self.run("ip", "link", "set", "lo", "up")

    def command(self, *command):
        """Returns the command that runs this one in the system, booted or not."""
        env = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND=noninteractive", "TERM=dumb"]
        if self.init:
            return ["nsenter", "--target", *self.init, "--all", *env, *command]
        return self.container(*env, *command)

    def run(self, *command, check=True, **kwargs):
        """Returns what the command printed; fails if it does."""
        done = subprocess.run(self.command(*command), stdin=kwargs.pop("stdin", subprocess.DEVNULL), text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)
        assert not check or done.returncode == 0, "%s: exit status %d:\n%s" % (command, done.returncode, done.stdout)
        return done.stdout

    def close(self):
        if self.nspawn:
            self.nspawn.send_signal(signal.SIGTERM)         # shuts the system down
            self.nspawn.wait(timeout=60)
        subprocess.run(["umount", "--recursive", self.memory], check=True)
        self.memory.rmdir()
        shutil.rmtree("/run/systemd/nspawn/propagate/" + self.name, ignore_errors=True)     # left without a manager
