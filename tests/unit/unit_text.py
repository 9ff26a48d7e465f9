"""How addresses and owners are printed, by all tools alike."""
import ipaddress
import os
import socket
import struct
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
        tool, = (tool for tool in ctext.TOOLS if hasattr(tool, "networks"))
        for scope, netns in (LO, HERE), (LO, HERE + 1), (0, HERE):
            text = tool.address(ctext.address("fe80::1", scope), netns)
            self.assertEqual(tool.networks(text), [(ipaddress.ip_network("fe80::1"), scope)])


class Owners(unittest.TestCase):
    def test_all_that_name_a_process(self):
        for tool in ctext.RINGS:
            self.assertEqual(tool.owner_text(struct.pack("=I16s", 7, b"a b")), (7, "a b", '"pid":7,"comm":"a b"'))
            self.assertEqual(tool.owner_text(struct.pack("=I16s", 7, b"")), (7, "", '"pid":7,"comm":""'))
            self.assertEqual(tool.owner_text(struct.pack("=I16s", 4194304, b"fifteen bytes..")),
                             (4194304, "fifteen bytes..", '"pid":4194304,"comm":"fifteen bytes.."'))
            self.assertEqual(tool.owner_text(struct.pack("=I16s", 7, b"a\0left")), (7, "a", '"pid":7,"comm":"a"'))
            self.assertEqual(tool.owner_text(struct.pack("=I16s", 0, b"x")), ("N/A", "N/A", '"pid":null,"comm":null'))


if __name__ == "__main__":
    unittest.main()
