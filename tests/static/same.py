#!/usr/bin/python3
"""A function, C or Python, that stands in several tools under one name has the same text in all of them, to the letter.

usage: same.py TOOL.py ...

Prints how each other text differs from the first one; exit status 1 if one does.
"""
import ast
import collections
import difflib
import re
import sys

# Functions that are each tool's own by nature.
OWN = {
    "parse_args", "cflags", "attach", "learn_existing", "header", "line", "trace", "main",
    "state_change", "accepted", "accept_returned", "tracepoint_destroy", "kprobe_destroy", "is_wanted",
}
C_FUNCTION = re.compile(r"^[a-z][\w ]*[ *](\w+)\([^;{}]*\)\s*\{", re.MULTILINE)
C_BRACES = re.compile(r'/\*.*?\*/|"(?:\\.|[^"\\])*"|[{}]', re.DOTALL)


def python_functions(source):
    """(name, text) of the functions and classes at the top level, with their decorators."""
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno] + [decorator.lineno for decorator in node.decorator_list])
            yield node.name, "\n".join(lines[first - 1:node.end_lineno])


def c_functions(source):
    """(name, text) of the functions in C text."""
    for function in C_FUNCTION.finditer(source):
        depth = 0
        for token in C_BRACES.finditer(source, function.start()):
            depth += {"{": 1, "}": -1}.get(token.group(), 0)
            if token.group() == "}" and not depth:
                yield function.group(1), source[function.start():token.end()]
                break


def functions(path):
    with open(path, encoding="utf-8") as file:
        source = file.read()
    yield from python_functions(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and "#include" in str(node.value):
            yield from c_functions(node.value)


def main():
    texts = collections.defaultdict(dict)           # name: {text: [tools]}
    for path in sys.argv[1:]:
        seen = set()
        for name, text in functions(path):
            if name not in seen:                    # under #else, there may be another one
                texts[name].setdefault(text, []).append(path)
            seen.add(name)
    differ = {name: versions for name, versions in texts.items() if len(versions) > 1 and name not in OWN}
    for name, versions in differ.items():
        (first, tools), *others = versions.items()
        for text, paths in others:
            print("\n".join(difflib.unified_diff(
                first.splitlines(), text.splitlines(), "%s() in %s" % (name, ", ".join(tools)), ", ".join(paths),
                lineterm="", n=1)))
    print("%d functions, %d of them in several tools" % (
        len(texts), sum(sum(map(len, versions.values())) > 1 for versions in texts.values())))
    return bool(differ)


if __name__ == "__main__":
    sys.exit(main())
