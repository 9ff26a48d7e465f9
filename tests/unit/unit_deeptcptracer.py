"""The logic of deeptcptracer, without tracing."""
import contextlib
import io
import ipaddress
import json
import struct
import unittest
from unittest import mock

import deeptcptracer

LOOPBACK = bytes(10) + b"\xff\xff\x7f\0\0\1"
IPV6 = bytes.fromhex("20010db8000000000000000000000001")


FORMAT = """name: tcp_send_reset
print fmt: "state=%s reason=%s", REC->state ? __print_symbolic(REC->state, { 1, "TCP_ESTABLISHED" }) : "UNKNOWN", \
__print_symbolic(REC->reason, { 0, "NOT_SPECIFIED" }, { 1, "NO_SOCKET" }, { 26, "NEWER_THAN_THIS_TEST" })
"""


def event(number=0, oldstate=7, state=2, sk_err=0, pid=16065, comm=b"wget", daddr=LOOPBACK, sport=0, detail=0, ns=None):
    owner = struct.pack("=I16s", pid, comm) + struct.pack("=I", number)
    source, destination = struct.pack("=16sHxx", daddr, sport), struct.pack("=16sHxx", daddr, 443)
    what = struct.pack("=iBBBB", sk_err, number, oldstate, state, detail)
    in_state = b"" if ns is None else struct.pack("=Q", ns)
    return 10 ** 9, owner, source, destination, what, 4026531840, 0, in_state, b""


class Deep(unittest.TestCase):
    def lines(self, record, *options):
        return deeptcptracer.line(deeptcptracer.parse_args(options), record, 0).splitlines()

    def test_record(self):
        form = struct.Struct(deeptcptracer.HEAD + "0s0s")
        self.assertEqual(form.unpack(form.pack(*event())), event())

    def test_documented_format(self):
        self.assertEqual(deeptcptracer.header(deeptcptracer.parse_args([])).splitlines(), [
            "Tracing TCP events. Ctrl-C to end.",
            "EVENT_SOURCE            PID    COMM             SOURCE                DESTINATION           "
            "TCP_STATE                SK_ERR"])
        self.assertEqual(self.lines(event()), [
            "tcp_set_state()         16065  wget             127.0.0.1:0           127.0.0.1:443         "
            "CLOSE -> SYN_SENT"])
        self.assertEqual(self.lines(event(1, 1, 4, sport=60590)), [
            "tcp_send_fin()          16065  wget             127.0.0.1:60590       127.0.0.1:443         FIN_WAIT1"])

    def test_unknown_owner(self):
        self.assertEqual(self.lines(event(pid=0))[0].split()[1:3], ["N/A", "N/A"])
        value = json.loads(self.lines(event(pid=0), "--json")[0])
        self.assertEqual((value["pid"], value["comm"]), (None, None))

    def test_json(self):
        value = json.loads(self.lines(event(5, 0, 7, 104, daddr=IPV6), "--json")[0])
        names = "event", "oldstate", "state", "sk_err", "ip", "daddr"
        self.assertEqual(tuple(value[name] for name in names),
                         ("sock_def_error_report()", None, "CLOSE", "ECONNRESET", 6, "2001:db8::1"))
        self.assertNotIn("stack", value)
        self.assertEqual([value[name] for name in ("ca_state", "reason", "state_ms")], [None] * 3)

    def with_format(self, text):
        """As on a kernel that describes its tracepoints so."""
        for function in deeptcptracer.reset_reasons, deeptcptracer.state_columns:
            self.addCleanup(function.cache_clear)
            function.cache_clear()
        patch = mock.patch.object(deeptcptracer, "tracepoint_format", lambda name: text)
        patch.start()
        self.addCleanup(patch.stop)

    def test_reset(self):
        """The reason has the kernel's name, where there is one, also without a socket."""
        for text, detail, reason in ((FORMAT, 1, "NO_SOCKET"), (FORMAT, 26, "NEWER_THAN_THIS_TEST"), (FORMAT, 99, None),
                                     (FORMAT.replace("reason", "other"), 0, None), ("", 1, None)):
            self.with_format(text)
            record = event(8, 0, 0, pid=0, detail=detail)
            value = json.loads(self.lines(record, "--json")[0])
            self.assertEqual([value[name] for name in ("event", "state", "sk_err", "reason")],
                             ["tcp_send_reset()", None, None, reason])
            self.assertEqual(self.lines(record)[0].split()[5:], ["N/A"] + [reason] * bool(reason))

    def test_arguments_of_tracepoints(self):
        """They are only read where the kernel has them."""
        for text, macros in ((FORMAT, ["-DERR(ctx)=(0)", "-DREASON(ctx)=(ctx->args[2])"]),
                             ('print fmt: "err=%d", REC->err', ["-DERR(ctx)=((int)ctx->args[2])", "-DREASON(ctx)=(0)"]),
                             ("", ["-DERR(ctx)=(0)", "-DREASON(ctx)=(0)"])):
            self.with_format(text)
            flags = deeptcptracer.cflags(deeptcptracer.parse_args([]))
            self.assertEqual([flag for flag in flags if flag.startswith(("-DERR", "-DREASON"))], macros)

    def test_retransmission(self):
        for detail, name in enumerate(["Open", "Disorder", "CWR", "Recovery", "Loss"]):
            record = event(4, 0, 1, detail=detail)
            self.assertEqual(self.lines(record)[0].split()[5:], ["ESTABLISHED/" + name])
            value = json.loads(self.lines(record, "--json")[0])
            self.assertEqual((value["state"], value["ca_state"]), ("ESTABLISHED", name))

    def test_times(self):
        """Only with -m, and only of a change of state."""
        heading = deeptcptracer.header(deeptcptracer.parse_args(["-m"])).splitlines()[1]
        self.assertEqual(heading.split()[-2:], ["SK_ERR", "MS"])
        for record, text, ms in ((event(0, 8, 9, ns=300123456), "300.12", 300.123456), (event(0, ns=0), "N/A", None),
                                 (event(0, 8, 7, 110, ns=6000), "0.01", 0.006), (event(3, 0, 8, ns=0), "", None)):
            self.assertEqual(self.lines(record, "-m")[0][heading.index("MS"):], text)
            self.assertEqual(json.loads(self.lines(record, "-m", "--json")[0])["state_ms"], ms)

    def test_networks_as_c(self):
        for text, inside, outside in (("10.0.0.0/8", "10.1.2.3", "11.0.0.1"), ("::1", "::1", "::2"),
                                      ("fd00::/8", "fd12::1", "10.0.0.1"), ("::/0", "2001::1", "127.0.0.1"),
                                      ("0.0.0.0/0", "1.2.3.4", "::1"), ("1.2.3.4,::1", "1.2.3.4", "1.2.3.5")):
            expression = deeptcptracer.address_condition(deeptcptracer.networks(text))
            expression = expression.replace("u)", ")").replace("!IS_IPV4(address)", "not is_ipv4")
            for address, expected in ((inside, True), (outside, False)):
                ip = ipaddress.ip_address(address)
                packed = ip.packed if ip.version == 6 else bytes(10) + b"\xff\xff" + ip.packed
                names = {"address": struct.unpack("=4I", packed), "is_ipv4": ip.version == 4}
                python = expression.replace("&&", "and").replace("||", "or").replace("u ", " ")
                result = eval(python, names)            # noqa: S307
                self.assertEqual(bool(result), expected, (text, address))

    def test_events(self):
        self.assertEqual(deeptcptracer.parse_args(["-e", "tcp_fin,tcp_ack()/win==0"]).events, {2, 6})
        self.assertEqual(deeptcptracer.parse_args(["-R"]).events, {4})
        self.assertEqual(len(deeptcptracer.parse_args([]).events), 9)

    def test_bad_arguments_exit_2(self):
        for wrong in (["-s", "x"], ["-e", "x"], ["-4", "-6"], ["-R", "-e", "tcp_fin"]):
            with self.assertRaises(SystemExit) as caught, contextlib.redirect_stderr(io.StringIO()):
                deeptcptracer.parse_args(wrong)
            self.assertEqual(caught.exception.code, 2)


if __name__ == "__main__":
    unittest.main()
