"""The logic of deeptcptracer, tcpaccept and tcpv4connect, without tracing."""
import contextlib
import io
import ipaddress
import json
import struct
import unittest

import deeptcptracer
import tcpaccept
import tcpv4connect

LOOPBACK = bytes(10) + b"\xff\xff\x7f\0\0\1"
IPV6 = bytes.fromhex("20010db8000000000000000000000001")


def event(number=0, oldstate=7, state=2, sk_err=0, pid=16065, comm=b"wget", daddr=LOOPBACK, sport=0):
    owner = struct.pack("=I16s", pid, comm) + struct.pack("=I", number)
    source, destination = struct.pack("=16sHxx", daddr, sport), struct.pack("=16sHxx", daddr, 443)
    what = struct.pack("=iBBBx", sk_err, number, oldstate, state)
    return 10 ** 9, owner, source, destination, what, 4026531840, 0, b""


class Deep(unittest.TestCase):
    def lines(self, record, *options):
        return deeptcptracer.line(deeptcptracer.parse_args(options), record, 0).splitlines()

    def test_record(self):
        form = struct.Struct(deeptcptracer.HEAD + "0s")
        self.assertEqual(form.unpack(form.pack(*event())), event())

    def test_as_in_the_sample(self):
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
        self.assertEqual(len(deeptcptracer.parse_args([]).events), 8)

    def test_bad_arguments_exit_2(self):
        for wrong in (["-s", "x"], ["-e", "x"], ["-4", "-6"], ["-R", "-e", "tcp_fin"]):
            with self.assertRaises(SystemExit) as caught, contextlib.redirect_stderr(io.StringIO()):
                deeptcptracer.parse_args(wrong)
            self.assertEqual(caught.exception.code, 2)


class AcceptAndConnect(unittest.TestCase):
    def accept(self, *options, comm=b"sshd"):
        record = tcpaccept.RECORD.unpack(tcpaccept.RECORD.pack(
            5 * 10 ** 9, struct.pack("=I16s", 907, comm), 4026531840, LOOPBACK, LOOPBACK, 22, 40000))
        args = tcpaccept.parse_args(options)
        return tcpaccept.header(args), tcpaccept.line(args, record, 5 * 10 ** 9, 0)

    def test_accept_as_in_the_sample(self):
        self.assertEqual(self.accept(), (
            "PID    COMM         IP RADDR            LADDR            LPORT\n",
            "907    sshd         4  127.0.0.1        127.0.0.1        22\n"))
        self.assertEqual(self.accept("-t"), (
            "TIME(s)  PID    COMM         IP RADDR            LADDR            LPORT\n",
            "0.000    907    sshd         4  127.0.0.1        127.0.0.1        22\n"))
        self.assertEqual(self.accept("-r")[1].split()[4], "40000")
        self.assertEqual(self.accept("-r")[0].split()[4], "RPORT")

    def connect(self, *options, comm=b"curl"):
        record = tcpv4connect.RECORD.unpack(tcpv4connect.RECORD.pack(
            5 * 10 ** 9, struct.pack("=I16s", 1469, comm), 1000, 4026531840,
            b"\x0a\xc9\xdb\xec", b"\x36\xf5\x69\x19", 80))
        args = tcpv4connect.parse_args(options)
        return tcpv4connect.header(args), tcpv4connect.line(args, record, 5 * 10 ** 9, 0)

    def test_connect_as_in_the_sample(self):
        self.assertEqual(self.connect(), (
            "PID    COMM         SADDR            DADDR            DPORT\n",
            "1469   curl         10.201.219.236   54.245.105.25    80\n"))
        self.assertEqual(self.connect("-U")[1].split()[0], "1000")
        value = json.loads(self.connect("--json")[1])
        self.assertEqual(sorted(value), sorted("ts pid comm uid ip saddr daddr dport netns".split()))

    def test_hostile_comm(self):
        for comm in (b"\x1b[2J", b"a\nb", b"\xff", b'"', b"\\"):
            for _, text in (self.accept(comm=comm), self.connect(comm=comm)):
                self.assertTrue(text[:-1].isprintable() and text.isascii(), text)
            for _, text in (self.accept("--json", comm=comm), self.connect("--json", comm=comm)):
                value = json.loads(text)
                self.assertEqual(bytes.fromhex(value.get("comm_hex", value["comm"].encode().hex())), comm)


if __name__ == "__main__":
    unittest.main()
