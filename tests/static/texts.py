#!/usr/bin/python3
"""What the documents say, against each other and against the tools.

usage: texts.py phrases FILE ... | messages TOOL ... | figures

phrases: no phrase of phrases.txt is in these files. messages: whatever these tools print on standard error is in their
manual pages. figures: the README's and the manual pages' figures are those of docs/benchmarks.md. Prints what is wrong;
exit status 1 if anything is.
"""
import ast
import importlib
import pathlib
import re
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def phrases(*paths):
    """Returns where a phrase is, and what to write instead."""
    wrong = []
    for line in (HERE / "phrases.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        pattern, instead = re.split(r"\t|  +", line, maxsplit=1)
        for path in map(pathlib.Path, paths):
            text = path.read_text(errors="replace")
            for found in re.finditer(pattern, text, re.IGNORECASE):
                line_number = text.count("\n", 0, found.start()) + 1
                wrong.append("%s:%d: %r: %s" % (path, line_number, found[0], instead.strip()))
    return wrong


def page(name):
    """Returns the text of a manual page on one line, with single spaces."""
    text = subprocess.run(["mandoc", "-T", "ascii", ROOT / "man" / ("man" + name[-1]) / name], stdout=subprocess.PIPE,
                          text=True, check=True).stdout
    return " ".join(re.sub(".\b", "", text).split())


def said_by(path):
    """Returns the messages in Python's text: the first string in each call for one, and what follows a tool's name."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    calls = [node for node in nodes if isinstance(node, ast.Call) and
             getattr(node.func, "id", getattr(node.func, "attr", "")) in ("say", "die", "exit", "OSError")]
    strings = [[node.value for node in ast.walk(call) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
               for call in calls]
    return [texts[0] for texts in strings if texts] + [
        node.value for node in nodes if isinstance(node, ast.Constant) and re.match("%s: (?!%s)", str(node.value))]


def messages(*tools):
    """Returns the messages that are in no manual page."""
    wrong = []
    for tool in tools:
        texts = [*getattr(importlib.import_module(tool), "LOSSES", {}).values(), *said_by(ROOT / (tool + ".py"))]
        pages = page(tool + ".8") + page("tcp-tracers.7")
        wrong += ["%s: in no manual page: %r" % (tool, text) for text in texts
                  if max(re.split(r"%\w|^btfheaders: ", text), key=len).strip(" :\n") not in pages]
    return wrong


# Columns of bench.py: by the README's headings, and by what the manual pages say
HEADINGS = {"CPU per connection": "CPU", "CPU at 1,000": "1000", "idle": "idle", "private": "priv", "peak": "peak",
            "start": "start", "rate kept": "kept", "RSS": "RSS"}
SENTENCES = {"CPU": r"used ([\d.]+) microseconds per connection", "1000": r"per second it used ([\d.]+) %",
             "idle": r"Idle it used ([\d.]+) %", "kept": r"ran at (\d+) %", "RSS": r"RSS was (\d+) MB",
             "priv": r"(\d+) MB of it private"}


def benchmarks():
    """Returns the table of docs/benchmarks.md: {row: {column: text}}, a peer's row with that of the tool before it."""
    text = (ROOT / "docs/benchmarks.md").read_text()
    heading, table = re.search(r"^ {30}(.*)\n((?:.+\n)+?)a system call", text, re.MULTILINE).groups()
    columns, rows, tool = heading.split(), {}, None
    for line in table.splitlines():
        name, values = line[:32].strip(), line[32:].split()
        tool = tool if line.startswith(" ") else name
        if len(values) == len(columns):
            rows[tool if tool == name else (tool, name.split()[0])] = dict(zip(columns, values))
    return rows


def figures():
    """Returns which figures are not those of docs/benchmarks.md."""
    rows, wrong = benchmarks(), []

    def expected(tool, column):
        of = [rows[name] for name in (tool, (tool, "libbpf-tools"), (tool, "bpfcc-tools")) if name in rows]
        values = [row.get(column, "no such column") for row in of]
        return ["%.0f" % (100 * float(value)) if value[0].isdigit() and column == "kept" else value for value in values]

    readme = (ROOT / "README.md").read_text()
    heading, *lines = re.search(r"^Overhead, from (?:.+\n)+\n((?:\|.*\n)+)", readme, re.MULTILINE)[1].splitlines()
    columns = [next((column for words, column in HEADINGS.items() if words in cell), cell.strip())
               for cell in heading.split("|")[2:-1]]
    for name, *cells in (line.split("|")[1:-1] for line in lines[1:]):
        tool = re.sub(r" \(.*", "", name.strip())
        for column, cell in zip(columns, cells):
            if re.findall(r"[\d.]+", cell) != (should := expected(tool, column)):
                wrong.append("README.md: %s, %s: %s, not %s" % (tool, column, cell.strip(), " / ".join(should)))
    judged = re.findall(r"^\S+ +(\w+)(-bpfcc)? +(\d+) +(\d+) +(\d+)$", (ROOT / "docs/benchmarks.md").read_text(),
                        re.MULTILINE)
    for tool, what, *cells in re.findall(r"^\| (\w+): (wrong process|missed) \| (.*?) \| (.*?) \| (.*?) \|", readme,
                                         re.MULTILINE):
        theirs, ours = ([row for row in judged if row[:2] == (tool, peer)] for peer in ("-bpfcc", ""))
        for cell, of, place in zip(cells, (ours, theirs, ours), (2, 3 + (what != "missed"), 3 + (what != "missed"))):
            should = [row[place] for row in of]
            if re.findall(r"\d+", cell) not in (should, sorted(set(should))):
                wrong.append("README.md: %s: %s: %s, not %s" % (tool, what, cell, ", ".join(should)))
    for tool in (name for name in rows if isinstance(name, str) and " " not in name):
        text = page(tool + ".8")
        for column in filter(rows[tool].get, SENTENCES):
            found = re.search(SENTENCES[column], text)
            if not found or found[1] != expected(tool, column)[0]:
                wrong.append("%s(8): %s: %s, not %s" % (tool, column, found and found[1], expected(tool, column)[0]))
    return wrong


def main():
    sys.path.insert(0, str(ROOT))
    wrong = {"phrases": phrases, "messages": messages, "figures": figures}[sys.argv[1]](*sys.argv[2:])
    print("\n".join(wrong))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
