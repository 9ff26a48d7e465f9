#!/usr/bin/python3
"""All five tools at once on one workload, in every way to start them.

usage: all_tools.py [MODE ...]

This is what kernels.sh runs on each kernel; it runs on any machine that can trace. A mode is a way to start the tools:
see MODES. Prints a row for each, and what was wrong on the lines before it; exit status 1 if anything was. Without any
it tries all but lockdown, which lasts until the machine boots again.
"""
import argparse
import collections
import contextlib
import os
import pathlib
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time

import live
import test_deeptcptracer
import test_tcpaccept
import test_tcpchurn
import test_tcplife
import test_tcpv4connect
import workload

TOOLS = ["tcplife", "tcpaccept", "tcpv4connect", "tcpchurn", "deeptcptracer"]
# name: where the types are from, and how accept() is traced: as is usual on this kernel, or not by a kprobe.
MODES = {
    "default": ("BTF", "default"),
    "alone": ("headers", "no-kprobe"),
    "pidns": ("BTF", "default"),        # all of it in a PID namespace
    "none": ("none", "default"),
    "lockdown": ("BTF", "default"),     # of confidentiality: nothing may read the kernel's memory
}
UNSHARE = ["unshare", "--pid", "--fork", "--mount-proc"]
ROW = "%-24s %-7s %-7s %-8s %-10s %s"


def bcc_version():
    return subprocess.run([live.PYTHON, "-c", "import bcc; print(bcc.__version__)"], stdout=subprocess.PIPE, text=True,
                          check=True).stdout.strip().partition("+")[0]


@contextlib.contextmanager
def tools_alone():
    """The tools in a folder without btfheaders.py."""
    with tempfile.TemporaryDirectory() as folder:
        for tool in TOOLS:
            shutil.copy(live.ROOT / (tool + ".py"), folder)
        live.TOOLS = folder
        try:
            yield
        finally:
            live.TOOLS = str(live.ROOT)


def has_io_uring():
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()):
        try:
            workload.uring_accept(listener).close()
        except OSError:
            return False
    return True


def make_sessions(scenarios, namespaces):
    """The log of workload.py. Half way the clock is set back by an hour, on a machine where that may be done."""
    half = len(scenarios) // 2
    log = workload.sessions(workload.work(scenarios[:half]))
    if os.environ.get("CLOCK_MAY_BE_SET"):
        time.clock_settime(time.CLOCK_REALTIME, time.time() - 3600)
    log += workload.sessions(workload.work(scenarios[half:]))
    return log + workload.sessions(workload.work(workload.ENDS, **namespaces.where))


def differences(accept, log, life, expected, tracers):
    """What is missing and what is wrong in the lines of each tool, as two dicts of lists."""
    sessions, accepts, connects, churn, events = (tracer.objects for tracer in tracers)
    missing, wrong = {}, {}
    # io_uring's accepts are no system calls
    shows_io_uring = os.path.exists("/sys/bus/event_source/devices/kprobe") and accept == "default"
    unseen = [record for record in log if record["scenario"] == "io_uring" and not shows_io_uring]
    missing["tcplife"], wrong["tcplife"] = test_tcplife.difference(
        [dict(record, accepted=None) if record in unseen else record for record in log], sessions)
    # an accept() or a change to ESTABLISHED that is lost
    lost = [text for text in wrong["tcplife"] if text.startswith(("accept_ms is None", "connect_ms is None"))]
    missing["tcplife"] += lost
    wrong["tcplife"] = [text for text in wrong["tcplife"] if text not in lost]
    wrong["tcplife"] += ["ends before it begins: %s" % line for line in sessions if line["ms"] < 0]
    missing["tcpaccept"], wrong["tcpaccept"] = live.compare(
        [record for record in test_tcpaccept.accepted(log) if record not in unseen], accepts, test_tcpaccept.key)
    missing["tcpv4connect"], wrong["tcpv4connect"] = live.compare(
        [record for record in log if record["role"] == "client" and record["ip"] == 4], connects,
        test_tcpv4connect.result if "-r" in tracers[2].command else test_tcpv4connect.key)
    total = collections.Counter(churn[-1]["all"] if churn else {})
    text = "%s, not %s" % (total, life.ALL)
    missing["tcpchurn"] = [text] * max((life.ALL - total).values(), default=0)
    wrong["tcpchurn"] = [text] if total - life.ALL else []
    strangers, unowned = test_deeptcptracer.wrong_owners(log, events)
    missing["deeptcptracer"] = ["no owner of a socket of %(comm)s in %(scenario)s" % record for record in unowned]
    missing["deeptcptracer"] += [text for scenario, endpoints in expected
                                 for text in test_deeptcptracer.difference(scenario, endpoints, events)]
    stacks = {" ".join((line["stack"] or ["none"])[:3]) for line in events
              if line["event"] == "tcp_set_state()" and line["state"] == "SYN_SENT"}
    usual = re.compile("(inet_sk_state_store )?(tcp_set_state )?tcp_v[46]_connect")
    wrong["deeptcptracer"] = strangers + ["stack of a connect: " + stack for stack in stacks if not usual.match(stack)]
    return missing, wrong


def trace(accept):
    """Run all on one workload; what was wrong, as texts, and what was looked at."""
    scenarios = workload.USUAL + ["io_uring"] * has_io_uring()
    life = test_tcpchurn.Life()
    # The plain tcpv4connect and the one with results take turns.
    more = {"tcpchurn": [life.pid], "deeptcptracer": ["-K", "-m"], "tcpv4connect": ["-r"] * (accept != "default")}
    tracers = [live.Tracer(tool, "--json", *more.get(tool, []),
                           *["--no-kprobe"] * (accept == "no-kprobe" and tool != "tcpv4connect"), check=False)
               for tool in TOOLS]
    sessions, accepts, connects, churn, events = tracers
    with live.Namespaces() as namespaces:
        own = live.of(workload.OWN, namespaces.hosts[0], namespaces.nowhere[0])
        with live.Times(own) as before:
            for tracer in tracers:
                tracer.start()
            with churn, events:
                with sessions, accepts, connects, live.Times(own) as after:
                    log = make_sessions(scenarios, namespaces)
                life.play()
                expected = test_deeptcptracer.provoke(test_deeptcptracer.SCENARIOS)
                life.end()
                time.sleep(1.2)         # an update of tcpchurn
    log = test_tcplife.timed(log, before, after)
    life.close()
    missing, wrong = differences(accept, log, life, expected, tracers)
    texts, losses = [], collections.Counter()
    for tool, tracer in zip(TOOLS, tracers):
        losses[tool] = live.reported_losses(tracer)
        rest = [line for line in tracer.stderr.splitlines() if " lost: " not in line and " has ended" not in line]
        texts += ["%s: %s" % (tool, text) for text in wrong[tool] + rest]
        texts += ["%s: exit status %d" % (tool, tracer.status)] * bool(tracer.status)
        if len(missing[tool]) > losses[tool]:
            texts += ["%s: missing: %s" % (tool, record) for record in missing[tool]]
    lost = ", ".join("%s %d" % item for item in (+losses).items())
    return texts, "%d sessions" % len(log) + ("; lost and reported: " + lost if lost else "")


def refuse(tool, words, wrapper=()):
    """What is wrong with how this tool says that it cannot trace, as a list of texts. words: a pattern."""
    command = [*wrapper, live.PYTHON, str(live.ROOT / (tool + ".py"))] + ["1"] * (tool == "tcpchurn")
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if (result.returncode, result.stdout) == (1, "") and re.fullmatch(
            "%s: cannot trace: %s\n" % (tool, words), result.stderr):
        return []
    return ["%s: exit status %d, %r, %r" % (tool, result.returncode, result.stdout, result.stderr)]


def run(mode):
    """What was wrong, as texts, and what was looked at."""
    types, accept = MODES[mode]
    if mode == "none":
        hide = "for d in /sys/kernel/btf /lib/modules; do [ ! -d $d ] || mount -t tmpfs none $d; done; exec \"$@\""
        return [text for tool in TOOLS for text in refuse(tool, r"no kernel types \(.*\): install linux-headers-.*", (
            "unshare", "--mount", "sh", "-c", hide, "sh"))], "reported in one line"
    if mode == "lockdown":
        pathlib.Path("/sys/kernel/security/lockdown").write_text("confidentiality")
        return [text for tool in TOOLS for text in refuse(tool, ".*lockdown.*")], "lockdown reported in one line"
    with tools_alone() if types == "headers" else contextlib.nullcontext():
        texts, result = trace(accept)
    return texts, result + " in a PID namespace" * (mode == "pidns")


def main():
    parser = argparse.ArgumentParser(description="All five tools at once on one workload.")
    parser.add_argument("modes", nargs="*", metavar="MODE", help=", ".join(MODES))
    args = parser.parse_args()
    release, bcc, python = platform.release(), bcc_version(), platform.python_version()
    inside = os.getpid() == 1
    status = 0
    if not inside:
        print(ROW % ("kernel", "bcc", "Python", "types", "accept()", "result"), flush=True)
    for mode in args.modes or [mode for mode in MODES if mode != "lockdown"]:
        if mode == "pidns" and not inside:
            status |= subprocess.run([*UNSHARE, live.PYTHON, "-W", "ignore", __file__, mode]).returncode
            continue
        began = time.monotonic()
        try:
            texts, result = run(mode)
        except AssertionError as error:
            texts, result = [str(error)], "does not start"
        for text in texts:
            print("wrong: %.500s" % text)
        status |= bool(texts)
        result = "%s: %s" % ("FAILED" if texts else "ok", result)
        print(ROW % (release, bcc, python, *MODES[mode], result), flush=True)
        print("%s took %d s" % (mode, time.monotonic() - began), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
