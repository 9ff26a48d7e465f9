"""Options that filter are conditions in C: compiled, and called for owners and endpoints."""
import ipaddress
import itertools
import os
import re
import socket
import struct
import unittest

import ctext

CALLS = """
static u32 current_uid;
u64 bpf_get_current_uid_gid(void) { return current_uid | 7ull << 32; }
int owner(struct owner *o, u32 uid)
{
    struct owner copy = *o;
    current_uid = uid;
    copy.wanted = copy.pid && IS_WANTED_PROCESS(&copy);
    return IS_WANTED_OWNER(&copy);
}
int peer(struct endpoints *e) { struct endpoints copy = *e; return IS_WANTED_PEER(&copy); }
int lport(u16 port) { return IS_WANTED_LPORT(port + 0); }
"""
NETNS = os.stat("/proc/self/ns/net").st_ino         # a number that no namespace has is refused
DEFAULT = {"pid": 1, "uid": 1000, "comm": "nginx", "laddr": "192.0.2.1", "raddr": "198.51.100.2", "lport": 5555,
           "rport": 80, "netns": NETNS, "scope": 0}
# What -4, ports and the like are called, and what of it passes: a change of DEFAULT, and whether that is wanted.
PID = {"-p 1": [({}, True), ({"pid": 2}, False), ({"pid": 0}, False)],
       "-p 1,3": [({}, True), ({"pid": 2}, False), ({"pid": 3}, True)]}
COMMON = {"": [({}, True), ({"raddr": "::1", "laddr": "::1", "pid": 0, "lport": 0, "rport": 65535}, True)],
          "--netns %d" % NETNS: [({}, True), ({"netns": 1}, False)],
          "--name nginx,fifteen-bytes..": [({}, True), ({"comm": "fifteen-bytes.."}, True), ({"comm": "nginx2"}, False),
                                           ({"comm": "ngin"}, False), ({"comm": ""}, False), ({"pid": 0}, False)],
          "--uid 1000,4294967295": [({}, True), ({"uid": 0}, False), ({"uid": 4294967295}, True)],
          "--uid 0 --name nginx": [({}, False), ({"uid": 0}, True), ({"uid": 0, "comm": "a"}, False)]}
REMOTE_ADDRESSES = {
    "%s 198.51.100.0/24,2001:db8::/32": [({}, True), ({"raddr": "1.2.3.4"}, False), ({"raddr": "2001:db8::1"}, True)],
    "%s !198.51.100.0/24,!::1": [({}, False), ({"raddr": "1.2.3.4"}, True), ({"raddr": "::1"}, False),
                                 ({"raddr": "::2"}, True)],
    "%s 198.51.0.0/16,!198.51.100.2": [({}, False), ({"raddr": "198.51.100.3"}, True), ({"raddr": "1.2.3.4"}, False)]}
LOCAL_ADDRESSES = {"%s 192.0.2.0/24": [({}, True), ({"laddr": "192.0.3.1"}, False)],
                   "%s !192.0.2.1": [({}, False), ({"laddr": "192.0.3.1"}, True)]}


def addresses(local, remote):
    """Returns these cases for a tool that calls the options so. local: None if it has none."""
    return {text % name: cases for name, texts in ((local, LOCAL_ADDRESSES), (remote, REMOTE_ADDRESSES)) if name
            for text, cases in texts.items()}


FAMILIES = {"-4": [({}, True), ({"raddr": "2001:db8::1"}, False), ({"raddr": "::1"}, False)],
            "-6": [({}, False), ({"raddr": "2001:db8::1"}, True), ({"raddr": "::"}, True),
                   ({"raddr": "::fffe:102:304"}, True), ({"raddr": "2001::ffff:102:304"}, True),
                   ({"raddr": "::1:0:ffff:102:304"}, True)]}
REMOTE = [({}, True), ({"rport": 443}, True), ({"rport": 81}, False), ({"lport": 443, "rport": 81}, False)]
LOCAL = [({}, True), ({"lport": 443}, True), ({"lport": 80}, False), ({"lport": 80, "rport": 443}, False)]
OPTIONS = {
    "tcplife": {**PID, **FAMILIES, **addresses("--laddr", "--raddr"), "-D 80,443": REMOTE, "-L 5555,443": LOCAL,
                "-L 5555 -D 80 -4 -p 1": [({}, True), ({"lport": 1}, False), ({"rport": 1}, False),
                                           ({"raddr": "::1"}, False), ({"pid": 2}, False)]},
    "tcpaccept": {**PID, **FAMILIES, **addresses("--laddr", "--raddr"), "-P 5555,443": LOCAL},
    "tcpv4connect": {**PID, **addresses("--saddr", "--daddr"), "-P 80,443": REMOTE,
                     "-u 1000": [({}, True), ({"uid": 0}, False)],
                     "-u 0": [({}, False), ({"uid": 0}, True)],
                     "-u 4294967295": [({}, False), ({"uid": 4294967295}, True)]},
    "tcpchurn": {**addresses(None, "--raddr"), "": [({}, True), ({"pid": 2}, False), ({"raddr": "127.0.0.1"}, True)],
                 "-p": [({"raddr": address}, is_public) for address, is_public in (
                     ("10.1.2.3", False), ("172.31.0.1", False), ("172.32.0.1", True), ("8.8.8.8", True),
                     ("127.0.0.1", False), ("::1", False), ("fe80::1", False), ("fd12::1", False), ("::2", True),
                     ("2001:db8::1", True), ("192.168.1.1", False), ("1.1.1.1", True), ("::", False))]},
    "deeptcptracer": {
        **PID, **FAMILIES, **addresses("-s", "-d"), "-D 80,443": REMOTE, "-S 5555,443": LOCAL,
        "-N %d" % NETNS: COMMON["--netns %d" % NETNS],
        "-s 192.0.2.0/24,::1": [({}, True), ({"laddr": "::1"}, True), ({"laddr": "192.0.3.1"}, False),
                                ({"laddr": "192.0.3.1", "raddr": "192.0.2.1"}, False)],
        "-d 198.51.100.2": [({}, True), ({"raddr": "198.51.100.3"}, False),
                            ({"raddr": "198.51.100.3", "laddr": "198.51.100.2"}, False)],
        "-d fe80::1%7": [({"raddr": "fe80::1", "scope": 7}, True), ({"raddr": "fe80::1", "scope": 8}, False),
                         ({"raddr": "fe80::1"}, False)],
        "-d fe80::1": [({"raddr": "fe80::1", "scope": 7}, True), ({"raddr": "fe80::1"}, True)],
        "-s 192.0.2.1 -d 1.1.1.1,198.51.100.0/30": [({}, True), ({"laddr": "1.1.1.1"}, False),
                                                    ({"raddr": "1.1.1.1"}, True), ({"raddr": "1.1.1.2"}, False)]}}


class Conditions(unittest.TestCase):
    def test_every_option(self):
        self.assertEqual(set(OPTIONS), {tool.PROGRAM for tool in ctext.TOOLS})
        for tool in ctext.TOOLS:
            for options, cases in {**COMMON, **OPTIONS[tool.PROGRAM]}.items():
                lib = ctext.library(tool, CALLS, *options.split())
                for change, expected in cases:
                    with self.subTest(tool=tool.PROGRAM, options=options, change=change):
                        of = {**DEFAULT, **change}
                        local, remote = (ctext.address(of[name], of["scope"]) for name in ("laddr", "raddr"))
                        ends = struct.pack("=20s20sHHI", local, remote, of["lport"], of["rport"], of["netns"])
                        wanted = (lib.owner(ctext.owner(of["pid"], of["comm"].encode()), of["uid"]), lib.peer(ends),
                                  lib.lport(of["lport"]))
                        self.assertEqual(all(wanted), expected)

    def test_addresses_are_read_for_a_filter_only(self):
        for tool in ctext.TOOLS:
            for options in {**COMMON, **OPTIONS[tool.PROGRAM]}:
                of_the_owner = " *(-u|--uid|--name) [^ ]+" + ("| *-p [^ ]+" if tool.PROGRAM != "tcpchurn" else "")
                of_the_socket = re.sub(of_the_owner, "", options)
                self.assertEqual(ctext.macros(tool, *options.split())["FILTERS"], "%d" % bool(of_the_socket), options)

    def test_chosen_events(self):
        tool, = (tool for tool in ctext.TOOLS if hasattr(tool, "EVENTS"))
        for options, expected in (
                ("", list(tool.EVENTS)[:-1]), ("-R", ["RETRANSMIT", "RETRANSMIT_SYNACK"]), ("-e tcp_fin", ["FIN"]),
                ("-e tcp_send_reset,tcp_ack,tcp_set_state", ["SET_STATE", "ZERO_WINDOW_RECEIVED", "SEND_RESET"])):
            lib = ctext.library(tool, "".join(["int f_%s(void) { return IS_CHOSEN(%s); }\n" % (name, name)
                                               for name in tool.EVENTS]), *options.split())
            self.assertEqual([name for name in tool.EVENTS if lib["f_" + name]()], expected)

    def test_only_numbers_reach_the_c_text(self):
        """All else in the compiler's flags is written in the tools."""
        words = {"true", "int", "u", "ull", "e", "o", "port", "uid", "event", "ctx", "args", "pid", "netns", "lport",
                 "rport", "laddr", "raddr", "word", "scope", "IS_IPV4", "comm", "wanted", "inode_of", "sk",
                 "bpf_get_current_uid_gid"}
        for tool in ctext.TOOLS:
            for options in {**COMMON, **OPTIONS[tool.PROGRAM]}:
                for flag in tool.cflags(ctext.parse(tool, *options.split()))[1:]:
                    value = re.fullmatch(r"-D[A-Z0-9_]+(?:\([a-z]+\))?=\((.*)\)", flag)[1]
                    self.assertLessEqual(set(re.findall("[A-Za-z_]+4?", value.replace("u32", ""))), words, flag)
                    self.assertRegex(value, r"^[A-Za-z0-9_ ()\[\].|&!=<>*-]+$")


class Networks(unittest.TestCase):
    texts = ("10.0.0.0/8", "::1", "fd00::/8", "::/0", "0.0.0.0/0", "1.2.3.4", "172.16.0.0/12", "127.0.0.1/32",
             "2001:db8::/33", "::/127", "fe80::/10", "::ffff:0:0/96", "::ffff:1.2.3.4", "2001:db8:8000::/97",
             "::/96", "::fffe:0:0/95")
    addresses = ("10.1.2.3", "11.0.0.1", "::1", "::2", "fd12::1", "fc00::1", "2001::1", "127.0.0.1", "1.2.3.4",
                 "1.2.3.5", "172.15.255.255", "172.16.0.0", "172.31.255.255", "172.32.0.0", "2001:db8:7fff::", "::",
                 "2001:db8:8000::", "2001:db8:8000::8000:0", "0.0.0.1", "255.255.255.255", "febf::1", "fec0::1",
                 "::1.2.3.4")

    def contains(self, network, text):
        """As ipaddress sees it, but for IPv4 in the form of IPv6, which is IPv4 here."""
        mapped = network.version == 6 and network.network_address.ipv4_mapped and network.prefixlen >= 96
        if mapped:
            network = ipaddress.ip_network("%s/%d" % (network.network_address.ipv4_mapped, network.prefixlen - 96))
        return ipaddress.ip_address(text) in network

    def test_as_ipaddress_has_them(self):
        networks = list(map(ipaddress.ip_network, self.texts))
        for tool in ctext.TOOLS:
            lib = ctext.library(tool, "\n".join([
                "int f%d(struct address *a) { return %s; }"
                % (n, tool.address_condition("(*a)", tool.networks(str(network))))
                for n, network in enumerate(networks)]))
            for (n, network), text in itertools.product(enumerate(networks), self.addresses):
                self.assertEqual(lib["f%d" % n](ctext.address(text)), self.contains(network, text), (network, text))

    def test_several_and_none(self):
        for tool in ctext.TOOLS:
            lib = ctext.library(tool, "int some(struct address *a) { return %s; }\nint none(void) { return %s; }" % (
                tool.address_condition("(*a)", tool.networks("10.0.0.0/8,fe80::/10%3")),
                tool.address_condition("(*a)", [])))
            for text, scope, expected in (("10.1.1.1", 0, 1), ("11.1.1.1", 0, 0), ("fe80::9", 3, 1), ("fe80::9", 2, 0)):
                self.assertEqual(lib.some(ctext.address(text, scope)), expected, (text, scope))
            self.assertEqual(lib.none(), 1)

    def test_names_of_interfaces(self):
        lo = socket.if_nametoindex("lo")
        for tool, (text, expected) in itertools.product(ctext.TOOLS, (
                ("fe80::1%lo", [("fe80::1/128", lo, False)]), ("!fe80::1%7", [("fe80::1/128", 7, True)]),
                ("fe80::/10%lo,10.0.0.1", [("fe80::/10", lo, False), ("::ffff:a00:1/128", 0, False)]),
                ("fe80::1", [("fe80::1/128", 0, False)]))):
            self.assertEqual([(str(network), *more) for network, *more in tool.networks(text)],
                             [(network, *more) for network, *more in expected])


if __name__ == "__main__":
    unittest.main()
