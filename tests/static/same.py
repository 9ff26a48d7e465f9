#!/usr/bin/python3
"""A part that several tools share has the same text in all of them, to the letter.

usage: same.py [--copy TOOL.py] TOOL.py ...

A part starts at a line `# ---- NAME ----`, in C text `/* ---- NAME ---- */`, and ends before the next one, before the
heading of the shared parts, or at the end of the C text. The part called as the tool is its own. Before the first part
there are only comments, and below the heading only parts. Prints how many lines each tool has, how each other text of a
part differs from the first one, and what is wrong with the headings; exit status 1 if anything is.

With --copy, the parts of that tool replace those of the others first.
"""
import argparse
import collections
import difflib
import pathlib
import re
import sys

START = re.compile(r"(# ---- .+ ----|/\* ---- .+ ---- \*/)$")
SHARED = "# -------- Shared from here on"
END = re.compile(r'(\w+ = r)?"""')
LIKE_A_START = re.compile(r"\s*(#|/\*) ?--")
COMMENT = re.compile(r"(#.*)?$")
BETWEEN = re.compile(r'%s.*|((\w+ = r)?""")?$' % SHARED)         # what may be there below the heading, too


def own(path):
    return "# ---- %s ----" % path.stem


def split(path):
    """Returns [(name, lines)] of a tool: its shared parts, and under the name None all else."""
    found = [(None, [])]
    for line in path.read_text().split("\n"):
        if START.match(line):
            found.append((None if line == own(path) else line, []))
        elif line.startswith(SHARED) or (found[-1][0] and END.match(line)):
            found.append((None, []))
        found[-1][1].append(line)
    return [(name, lines) for name, lines in found if lines]


def text_of(lines):
    return "\n".join(lines).rstrip("\n")


def copy(source, paths):
    """Gives the parts of source to the others that have them. The empty lines between two parts stay as they are."""
    texts = {name: text_of(lines) for name, lines in split(source) if name}
    for path in paths:
        path.write_text("\n".join([
            texts.get(name, text_of(lines)) + "\n" * (len("\n".join(lines)) - len(text_of(lines)))
            for name, lines in split(path)]))


def wrong_headings(path):
    """Returns why the parts of this tool may not be what they seem to be."""
    found = split(path)
    lines = [line for _, part in found for line in part]
    names = collections.Counter(name for name, _ in found if name)
    wrong = ["not once: %s" % heading for heading in (own(path), SHARED)
             if sum(line.startswith(heading) for line in lines) != 1]
    wrong += ["more than once: %s" % name for name, count in names.items() if count > 1]
    wrong += ["neither a part nor a comment: %s" % line for line in lines
              if LIKE_A_START.match(line) and not START.match(line) and not line.startswith(SHARED)]
    allowed = COMMENT           # outside of the shared parts
    for name, part in found:
        if part[0].startswith((own(path), SHARED)):
            allowed = BETWEEN if part[0].startswith(SHARED) else re.compile("")
        wrong += ["in no part: %s" % line for line in part if not name and not allowed.match(line)]
    return ["%s: %s" % (path.name, why) for why in wrong]


def main():
    parser = argparse.ArgumentParser(description="A part that several tools share has the same text in all of them.")
    parser.add_argument("--copy", metavar="TOOL.py", type=pathlib.Path, help="replace the others' parts by this tool's")
    parser.add_argument("tools", metavar="TOOL.py", nargs="+", type=pathlib.Path)
    args = parser.parse_args()
    if args.copy:
        if args.copy not in args.tools:
            parser.error("not one of the tools: %s" % args.copy)
        wrong = wrong_headings(args.copy)
        if wrong:
            sys.exit("\n".join(wrong))
        copy(args.copy, args.tools)
    wrong = []
    texts = collections.defaultdict(dict)           # name: {text: [tools]}
    for path in args.tools:
        found = split(path)
        total, its_own = path.read_text().count("\n"), sum(len(lines) for name, lines in found if not name)
        print("%-17s %4d lines: %3d shared, %3d its own" % (path.name, total, total - its_own, its_own))
        wrong += wrong_headings(path)
        for name, lines in found:
            if name:
                texts[name].setdefault(text_of(lines), []).append(path.name)
    for name, versions in texts.items():
        (first, tools), *others = versions.items()
        if not others and len(tools) == 1 < len(args.tools):
            wrong.append("%s: in no other tool: %s" % (*tools, name))
        for text, others_tools in others:
            wrong += difflib.unified_diff(first.split("\n"), text.split("\n"), "%s in %s" % (name, ", ".join(tools)),
                                          ", ".join(others_tools), lineterm="", n=1)
    print("\n".join(wrong), end="\n" * bool(wrong))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
