"""btfheaders: the tree it makes, and that nothing of it stays."""
import os
import pathlib
import subprocess
import tempfile
import unittest
from unittest import mock

import btfheaders
import live

HAS_BTF = os.path.exists(btfheaders.VMLINUX_BTF)


@unittest.skipUnless(HAS_BTF, "needs a kernel with BTF")
class Tree(unittest.TestCase):
    def test_only_the_types_asked_for(self):
        text = btfheaders.declarations(["tcphdr"])
        self.assertIn("struct tcphdr {", text)
        self.assertIn("#define BTF_HAS_tcphdr 1", text)
        self.assertNotIn("struct tcp_sock", text)

    def test_names_the_kernel_lacks_are_left_out(self):
        self.assertEqual(btfheaders.declarations(["no_such_type"]), "")

    def test_set_and_unset(self):
        with btfheaders.kernel_source(["tcphdr"]):
            tree = pathlib.Path(os.environ["BCC_KERNEL_SOURCE"])
            self.assertTrue((tree / "include/linux/kconfig.h").exists())
            self.assertIn("tcphdr", (tree / "include/vmlinux.h").read_text())
        self.assertNotIn("BCC_KERNEL_SOURCE", os.environ)
        self.assertFalse(tree.exists())

    def test_the_users_own_tree_is_left_alone(self):
        with mock.patch.dict(os.environ, BCC_KERNEL_SOURCE="/mine"), btfheaders.kernel_source(["tcphdr"]):
            self.assertEqual(os.environ["BCC_KERNEL_SOURCE"], "/mine")

    def test_two_at_once(self):
        with btfheaders.private_directory() as one, btfheaders.private_directory() as other:
            pathlib.Path(one, "planted").touch()
            self.assertEqual(os.listdir(other), [])

    def test_a_folder_where_nothing_can_be_mounted(self):
        with mock.patch.object(btfheaders, "detached_tmpfs", side_effect=OSError):
            with btfheaders.private_directory() as path:
                self.assertEqual(os.stat(path).st_mode & 0o777, 0o700)
                btfheaders.write_tree(path, ["tcphdr"])
            self.assertFalse(os.path.exists(path))

    def test_gone_after_an_error(self):
        with self.assertRaises(KeyError), btfheaders.kernel_source(["tcphdr"]):
            path = os.environ["BCC_KERNEL_SOURCE"]
            raise KeyError
        self.assertFalse(os.path.exists(path))

    def test_command(self):
        command = [live.PYTHON, live.ROOT / "btfheaders.py"]
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([*command, folder], check=True)
            self.assertTrue(os.path.exists(folder + "/include/linux/version.h"))
        printed = subprocess.run([*command, "-t", "tcphdr"], check=True, capture_output=True, text=True).stdout
        self.assertIn("struct tcphdr {", printed)
        failed = subprocess.run([*command, "/proc/nowhere"], capture_output=True, text=True, check=False)
        self.assertEqual((failed.returncode, failed.stderr.count("\n")), (1, 1))


class Missing(unittest.TestCase):
    def test_no_btf(self):
        with mock.patch.object(btfheaders, "VMLINUX_BTF", "/nonexistent"), self.assertRaises(OSError):
            btfheaders.declarations(["tcphdr"])


if __name__ == "__main__":
    unittest.main()
