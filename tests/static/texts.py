#!/usr/bin/python3
"""What the documents say, against each other and against the tools.

usage: texts.py phrases FILE ... | messages TOOL ... | figures

phrases: no phrase of phrases.txt is in these files. messages: whatever these tools print on standard error is in their
manual pages. figures: the README's and the manual pages' figures are those of docs/benchmarks.md, and its samples those
of the example files. Prints what is wrong; exit status 1 if anything is.
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


# Columns of bench.py: by the README's headings, with their units, and by what the manual pages say
COLUMNS = {"CPU per connection": ("CPU", "us"), "CPU at 1,000 per second (tool + BPF)": ("1000", "%"),
           "idle": ("idle", "%"), "private memory": ("priv", "MB"), "start": ("start", "s")}
SENTENCES = {"CPU": r"used ([\d.]+) microseconds per connection", "1000": r"per second it used ([\d.]+) %",
             "idle": r"Idle it used ([\d.]+) %", "RSS": r"RSS was (\d+) MB",
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


def shown(row, column):
    """Returns the text of a column of the README; 2.00 seconds: nothing was printed within them."""
    name, unit = COLUMNS[column]
    value = row[name]
    return "-" if (name, value) == ("start", "2.00") else "%s %s" % (value, unit)


def tables(text):
    """Returns the tables of a text in Markdown, each a list of rows of cells."""
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
             if not line.startswith("|-")] for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]


def costs(heading, rows):
    """Returns what is wrong in the README's table of costs. What is not measured is a dash."""
    known, wrong = benchmarks(), []
    for tool, *cells in rows:
        tool = re.sub(r" \(.*\)", "", tool)
        of = [known[name] for name in (tool, (tool, "libbpf-tools"), (tool, "bpfcc-tools")) if name in known]
        for column, cell in zip(heading[1:], cells):
            expected = [shown(row, column) for row in of]
            expected = " / ".join(expected) if set(expected) != {"-"} else "-"
            if cell != expected:
                wrong.append("README.md: %s, %s: %s, not %s" % (tool, column, cell, expected))
    return wrong


def accuracy(_, rows):
    """Returns what is wrong in the README's table of what tools missed, and whose owners were wrong."""
    text, wrong = (ROOT / "docs/benchmarks.md").read_text(), []
    known = re.findall(r"^(\d+[.]\d+)\S* +(\S.*?\S) +(\d+) +(\d+) +(\d+)$", text, re.MULTILINE)
    for name, *cells in rows:
        tool, what = name.split(": ")
        number = {"missed": 3, "wrong process": 4}[what]
        expected = [", ".join(dict.fromkeys(row[2] for row in known if row[1] == tool))]
        expected.append(", ".join(row[number] for row in known if row[1] == tool + "-bpfcc" and row[0] != "6.18"))
        expected.append(", ".join(row[number] for row in known if row[1] == "libbpf " + tool))
        expected.append(", ".join(dict.fromkeys(row[number] for row in known if row[1] == tool)))
        if cells != expected:
            wrong.append("README.md: %s: %s, not %s" % (name, cells, expected))
    return wrong


def measured(unit):
    """Returns the numbers that have this unit in the documents with measurements."""
    paths = [ROOT / "docs/benchmarks.md", *(ROOT / "examples").glob("*.txt")]
    text = " ".join([path.read_text() for path in paths] + [page(path.name) for path in (ROOT / "man").glob("*/*")])
    found = set(re.findall(r"([\d.,]*\d) %s(?!\w)" % {"ms": "(?:ms|milliseconds)"}.get(unit, unit), text))
    return found | {row[name] for row in benchmarks().values() for name in ("RSS", "priv") if unit == "MB"}


def readme():
    """Returns what is wrong in the README: its samples are in the example files, and its figures are measured."""
    text, wrong = (ROOT / "README.md").read_text(), []
    examples = [path.read_text() for path in (ROOT / "examples").glob("*.txt")]
    for sample in re.findall(r"^```\n(.*?)^```\n", text, re.MULTILINE | re.DOTALL):
        if not any(all(part in example for part in sample.split("[...]\n")) for example in examples):
            wrong.append("README.md: in no example file: %s" % sample)
    for heading, *rows in tables(text):
        check = {"question": None, "connections": accuracy, "CPU per connection": costs}[heading[0] or heading[1]]
        wrong += check(heading, rows) if check else []
    prose = re.sub(r"^```\n(?s:.*?)^```\n|^\|.*\n|`[^`]*`", "", text, flags=re.MULTILINE)
    number = r"([\d.,]*\d)"
    for *numbers, unit in re.findall(r"(?:%s\s+to\s+)?%s\s+(%%|Mi?B|[mnu]?s|sessions)(?!\w)" % (number, number), prose):
        wrong += ["README.md: %s %s is not measured" % (one, unit)
                  for one in filter(None, numbers) if one not in measured(unit)]
    return wrong


def figures():
    """Returns which figures are not those of docs/benchmarks.md."""
    rows, wrong = benchmarks(), readme()

    for tool in (name for name in rows if isinstance(name, str) and " " not in name):
        text = page(tool + ".8")
        for column in filter(rows[tool].get, SENTENCES):
            found = re.search(SENTENCES[column], text)
            if not found or found[1] != rows[tool][column]:
                wrong.append("%s(8): %s: %s, not %s" % (tool, column, found and found[1], rows[tool][column]))
    return wrong


def main():
    sys.path.insert(0, str(ROOT))
    wrong = {"phrases": phrases, "messages": messages, "figures": figures}[sys.argv[1]](*sys.argv[2:])
    print("\n".join(wrong))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
