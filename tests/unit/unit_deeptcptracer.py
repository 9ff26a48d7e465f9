"""The logic of deeptcptracer, without tracing."""
import contextlib
import io
import json
import os
import struct
import time
import unittest
from unittest import mock

import ctext
import deeptcptracer

SADDR, DADDR = "192.0.2.1", "198.51.100.2"


FORMAT = """name: tcp_send_reset
print fmt: "state=%s reason=%s", REC->state ? __print_symbolic(REC->state, { 1, "TCP_ESTABLISHED" }) : "UNKNOWN", \
__print_symbolic(REC->reason, { 0, "NOT_SPECIFIED" }, { 1, "NO_SOCKET" }, { 26, "NEWER_THAN_THIS_TEST" })
"""


def record(args, event="SET_STATE", oldstate="CLOSE", state="SYN_SENT", sk_err=0, pid=16065, comm=b"wget", saddr=SADDR,
           daddr=DADDR, sport=60590, detail=0, ns=0, stack=(), scope=0):
    """A record as the options make it. Each number in it is another one."""
    form, states = deeptcptracer.record_of(args), deeptcptracer.STATES
    return form.unpack(form.pack(
        10 ** 9 + 5 * 10 ** 6, ctext.owner(pid, comm), sk_err, ctext.address(saddr, scope),
        ctext.address(daddr, scope), sport, 443, 4026531840, list(deeptcptracer.EVENTS).index(event),
        states.index(oldstate), states.index(state), detail, 4711, 129, 128,
        8 * len(stack), struct.pack("=Q", ns),
        struct.pack("=%dQ" % len(stack), *stack)))


class Deep(unittest.TestCase):
    def lines(self, *options, **fields):
        args = deeptcptracer.parse_args(options)
        return deeptcptracer.line(args, record(args, **fields), 10 ** 9).splitlines()

    def value(self, *options, **fields):
        line, = self.lines("--json", *options, **fields)
        return json.loads(line)

    def test_documented_format(self):
        self.assertEqual(deeptcptracer.header(deeptcptracer.parse_args([])).splitlines(), [
            "Tracing TCP events. Ctrl-C to end.",
            "EVENT_SOURCE            PID    COMM             SOURCE                DESTINATION           "
            "TCP_STATE                SK_ERR"])
        self.assertEqual(self.lines(sport=0), [
            "tcp_set_state()         16065  wget             192.0.2.1:0           198.51.100.2:443      "
            "CLOSE -> SYN_SENT"])
        self.assertEqual(self.lines(event="SEND_FIN", oldstate="ESTABLISHED", state="FIN_WAIT1", sk_err=104), [
            "tcp_send_fin()          16065  wget             192.0.2.1:60590       198.51.100.2:443      "
            "FIN_WAIT1                ECONNRESET"])
        self.assertEqual(self.lines(saddr="2001:db8::1", daddr="2001:db8::2")[0].split()[3:5],
                         ["[2001:db8::1]:60590", "[2001:db8::2]:443"])
        self.assertEqual(self.lines(saddr="fe80::1", daddr="fe80::2", scope=4000000000)[0].split()[3:5],
                         ["[fe80::1%4000000000]:60590", "[fe80::2%4000000000]:443"])

    def test_a_syn_ack_again(self):
        how = {"event": "RETRANSMIT_SYNACK", "oldstate": "", "state": "NEW_SYN_RECV"}
        self.assertEqual(self.lines(**how)[0].split()[-3:], ["NEW_SYN_RECV", "queue", "129/128"])
        value = self.value(**how)
        self.assertEqual((value["backlog"], value["max_backlog"]), (129, 128))

    def test_unknown_owner(self):
        self.assertEqual(self.lines(pid=0)[0].split()[1:3], ["N/A", "N/A"])
        value = self.value(pid=0)
        self.assertEqual((value["pid"], value["comm"]), (None, None))

    def test_json(self):
        self.assertEqual(self.value("-m", oldstate="FIN_WAIT1", state="CLOSE", sk_err=104, ns=2500000), {
            "ts": 2.005, "event": "tcp_set_state()", "pid": 16065, "comm": "wget", "ip": 4, "saddr": SADDR,
            "sport": 60590, "daddr": DADDR, "dport": 443, "oldstate": "FIN_WAIT1", "state": "CLOSE",
            "sk_err": "ECONNRESET", "ca_state": None, "reason": None, "state_ms": 2.5, "netns": 4026531840,
            "inode": 4711, "cgroup": None, "backlog": None, "max_backlog": None})
        value = self.value(event="ERROR", oldstate="", state="CLOSE", sk_err=9999, saddr="2001:db8::1",
                           daddr="2001:db8::2")
        names = "event", "oldstate", "state", "sk_err", "ip", "saddr", "daddr", "state_ms"
        self.assertEqual([value[name] for name in names], [
            "sock_def_error_report()", None, "CLOSE", "9999", 6, "2001:db8::1", "2001:db8::2", None])

    def test_stack(self):
        """As addresses, where the kernel has no names for this user."""
        with mock.patch.object(deeptcptracer, "has_names", lambda: False):
            self.addCleanup(deeptcptracer.stack_of.cache_clear)
            self.assertEqual(self.lines("-K", stack=(0x10, 0xffffffff81000000))[1:],
                             ["    0x10", "    0xffffffff81000000", ""])
            self.assertEqual(self.value("-m", "-K", stack=(1, 2), ns=7000000)["stack"], ["0x1", "0x2"])
            self.assertEqual(self.value("-m", "-K", stack=(1, 2), ns=7000000)["state_ms"], 7)
            self.assertEqual(len(self.lines("-K")), 1)
            self.assertIsNone(self.value("-K")["stack"])

    def with_format(self, text):
        """As on a kernel that describes its tracepoints so."""
        self.addCleanup(deeptcptracer.state_columns.cache_clear)
        deeptcptracer.state_columns.cache_clear()
        for patch in (mock.patch.object(deeptcptracer, "tracepoint_format", lambda name: text),
                      mock.patch.object(deeptcptracer, "RESET_REASONS", {})):
            patch.start()
            self.addCleanup(patch.stop)
        deeptcptracer.RESET_REASONS.update(deeptcptracer.reset_reasons())

    def test_reset(self):
        """The reason has the kernel's name, where there is one, also without a socket."""
        for text, detail, reason in ((FORMAT, 1, "NO_SOCKET"), (FORMAT, 26, "NEWER_THAN_THIS_TEST"), (FORMAT, 99, None),
                                     (FORMAT.replace("reason", "other"), 0, None), ("", 1, None)):
            self.with_format(text)
            fields = {"event": "SEND_RESET", "oldstate": "", "state": "", "pid": 0, "detail": detail}
            value = self.value(**fields)
            self.assertEqual([value[name] for name in ("event", "state", "sk_err", "reason")],
                             ["tcp_send_reset()", None, None, reason])
            self.assertEqual(self.lines(**fields)[0].split()[5:], ["N/A"] + [reason] * bool(reason))

    def test_arguments_of_tracepoints(self):
        """They are only read where the kernel has them."""
        for text, err, reason in ((FORMAT, "0", "ctx->args[2]"), ("", "0", "0"),
                                  ('print fmt: "err=%d", REC->err', "(int)ctx->args[2]", "0")):
            self.with_format(text)
            macros = ctext.macros(deeptcptracer)
            self.assertEqual((macros["ERR(ctx)"], macros["REASON(ctx)"]), (err, reason))

    def test_retransmission(self):
        for detail, name in enumerate(["Open", "Disorder", "CWR", "Recovery", "Loss"]):
            fields = {"event": "RETRANSMIT", "oldstate": "", "state": "ESTABLISHED", "detail": detail}
            self.assertEqual(self.lines(**fields)[0].split()[5:], ["ESTABLISHED/" + name])
            value = self.value(**fields)
            self.assertEqual((value["state"], value["ca_state"]), ("ESTABLISHED", name))

    def test_times(self):
        """Only with -m, and only of a change of state."""
        heading = deeptcptracer.header(deeptcptracer.parse_args(["-m"])).splitlines()[1]
        self.assertEqual(heading.split()[-2:], ["SK_ERR", "MS"])
        for event, oldstate, state, sk_err, ns, text in (
                ("SET_STATE", "CLOSE_WAIT", "LAST_ACK", 0, 300123456, "300.12"),
                ("SET_STATE", "CLOSE", "SYN_SENT", 0, 0, "N/A"), ("SEND_FIN", "CLOSE_WAIT", "LAST_ACK", 0, 0, ""),
                ("SET_STATE", "CLOSE_WAIT", "CLOSE", 110, 6000, "0.01"), ("RESET", "", "CLOSE_WAIT", 0, 0, "")):
            fields = {"event": event, "oldstate": oldstate, "state": state, "sk_err": sk_err, "ns": ns}
            self.assertEqual(self.lines("-m", **fields)[0][heading.index("MS"):], text)
            self.assertEqual(self.value("-m", **fields)["state_ms"], ns / 1e6 or None)
            self.assertTrue(self.lines("-m", **fields)[0].startswith(self.lines(**fields)[0]))

    def test_timestamp(self):
        self.addCleanup(time.tzset)
        with mock.patch.dict(os.environ, TZ="UTC"):
            time.tzset()
            deeptcptracer.clock.cache_clear()
            self.assertEqual(self.lines("-t"), ["00:00:02.005 " + self.lines()[0]])
        deeptcptracer.clock.cache_clear()

    def test_events(self):
        self.assertEqual(deeptcptracer.parse_args(["-e", "tcp_fin,tcp_ack()/win==0"]).events, {2, 6})
        self.assertEqual(deeptcptracer.parse_args(["-R"]).events, {4, 9})
        self.assertEqual(len(deeptcptracer.parse_args([]).events), 9)

    def test_bad_arguments_exit_2(self):
        for wrong in (["-s", "x"], ["-e", "x"], ["-4", "-6"], ["-R", "-e", "tcp_fin"]):
            with self.assertRaises(SystemExit) as caught, contextlib.redirect_stderr(io.StringIO()):
                deeptcptracer.parse_args(wrong)
            self.assertEqual(caught.exception.code, 2)


if __name__ == "__main__":
    unittest.main()
