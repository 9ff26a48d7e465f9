"""How addresses and owners are printed, by all tools alike."""
import ipaddress
import json
import os
import socket
import unittest
from unittest import mock

import ctext

HERE = os.stat("/proc/self/ns/net").st_ino
LO = socket.if_nametoindex("lo")


class Addresses(unittest.TestCase):
    def setUp(self):
        for tool in ctext.RINGS:
            tool.address.cache_clear()
            self.addCleanup(tool.address.cache_clear)

    def check(self, text, scope, netns, expected):
        for tool in ctext.RINGS:
            self.assertEqual(tool.address(ctext.address(text, scope), netns), expected, tool)

    def test_as_usual(self):
        for text in "127.0.0.1", "10.1.2.3", "255.255.255.255", "2001:db8::1", "::1", "::", "fe80::1", \
                "2001::ffff:102:304", "::1:0:ffff:102:304":
            self.check(text, 0, HERE, text)

    def test_the_interface_of_a_link_local_address(self):
        for text in "fe80::1", "febf:1234::1":
            self.check(text, LO, HERE, text + "%lo")
            self.check(text, LO, HERE + 1, "%s%%%d" % (text, LO))         # another namespace has other names
            self.check(text, 4000000000, HERE, text + "%4000000000")      # it has gone

    def test_no_interface_where_it_says_nothing(self):
        """A socket may be bound to one whatever its addresses are."""
        for text in "2001:db8::1", "127.0.0.1", "::1", "fec0::1", "fe7f::1", "169.254.1.1":
            self.check(text, LO, HERE, text)

    def test_odd_names(self):
        """The number stands for a name that would have to be quoted in JSON or CSV, or has characters of an address."""
        for name, is_plain in (("br-lan.100", True), ("wlp2s0", True), ("veth_1", True), ('a"b', False), ("a%b", False),
                               ("a,b", False), ("a:b", False), ("a]b", False), ("é", False), ("\x1b[2J", False),
                               ("a\\b", False), ("\udcff", False)):
            with mock.patch("socket.if_indextoname", return_value=name):
                self.setUp()
                self.check("fe80::1", 7, HERE, "fe80::1%" + (name if is_plain else "7"))

    def test_as_the_option_takes_it(self):
        tool = ctext.RINGS[0]
        for scope, netns in (LO, HERE), (LO, HERE + 1), (0, HERE):
            text = tool.address(ctext.address("fe80::1", scope), netns)
            self.assertEqual(tool.networks(text), [(ipaddress.ip_network("fe80::1"), scope, False)])


class Owners(unittest.TestCase):
    def test_all_that_name_a_process(self):
        for pid, comm, expected in ((7, b"a b", (7, "a b", "N/A", '"pid":7,"comm":"a b","cgroup":null')),
                                    (7, b"", (7, "", "N/A", '"pid":7,"comm":"","cgroup":null')),
                                    (4194304, b"fifteen bytes..", (4194304, "fifteen bytes..", "N/A",
                                     '"pid":4194304,"comm":"fifteen bytes..","cgroup":null')),
                                    (7, b"a\0left", (7, "a", "N/A", '"pid":7,"comm":"a","cgroup":null')),
                                    (0, b"x", ("N/A", "N/A", "N/A", '"pid":null,"comm":null,"cgroup":null'))):
            for tool in ctext.RINGS:
                self.assertEqual(tool.owner_text(ctext.owner(pid, comm)), expected)

    def test_units(self):
        """The name of a service, the digits that docker ps shows, or the last part; whatever bytes they are."""
        container = "0123456789abcdef" * 4
        for path, expected in (("/system.slice/nginx.service", "nginx"), ("/", "/"), (None, "N/A"),
                               ("/user.slice/user-0.slice/session-3.scope", "session-3.scope"),
                               ("/system.slice/docker-%s.scope" % container, container[:12]),
                               ("/kubepods.slice/pod1.slice/cri-containerd-%s.scope" % container, container[:12]),
                               ("/docker/%s/init" % container, container[:12]), ("/a\x1b\udcff", "a\\x1b\\xff")):
            for tool in ctext.RINGS:
                tool.owner_text.cache_clear()
                with mock.patch.object(tool, "cgroup_path", lambda _, path=path: path):
                    _, _, unit, members = tool.owner_text(ctext.owner(7, b"a", 99))
                tool.owner_text.cache_clear()
                value = json.loads("{%s}" % members)["cgroup"]
                self.assertEqual(unit, expected)
                self.assertEqual(value, path and path.replace("\udcff", "\\xff"))


if __name__ == "__main__":
    unittest.main()
