#!/usr/bin/python3
"""Draws what bench.py has printed: docs/overhead.svg, readable on a light and on a dark page.

usage: bench.py | plot.py SVG
"""
import re
import sys

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "overhead", "svg.fonttype": "none", "font.family": "sans-serif",
                            "font.size": 9, "text.color": "#808890",
                            "axes.labelcolor": "#808890", "xtick.color": "#808890", "ytick.color": "#808890"})
from matplotlib import pyplot as plt

COLORS = {"ours": "#2da44e", "libbpf-tools": "#d29922", "bpfcc-tools": "#cf5b56"}
# The rows to draw, as bench.py names them, and by what name.
ROWS = {"tcplife": "tcplife", "tcpaccept": "tcpaccept", "tcpv4connect": "tcpv4connect", "tcpchurn": "tcpchurn",
        "deeptcptracer -e tcp_set_state": "deeptcptracer\n-e tcp_set_state\n(tcpstates)"}


def read(lines):
    """Returns {tool: {"ours" or peer: (CPU us per connection, its spread, percent of a CPU at 1,000 per second)}}."""
    tools, tool = {}, None
    for line in lines:
        name, values = line[:32].strip(), line[32:].split()
        if len(values) < 11 or not re.fullmatch(r"[\d.]+", values[0]):
            continue
        tool = tool if line.startswith(" ") else name
        tools.setdefault(tool, {})["ours" if name == tool else name.split()[0]] = tuple(
            float(values[column]) for column in (0, 1, 4))
    return {name: tools[tool] for tool, name in ROWS.items() if tool in tools}


def draw(axes, tools, title, form, value, spread=None):
    """Draws one bar for each tool and peer. value, spread: which of the values of read()."""
    place, ticks = 0, []
    for bars in tools.values():
        for who, values in bars.items():
            error = values[spread] if spread else 0
            axes.barh(place, values[value], color=COLORS[who], height=0.8, xerr=error or None, ecolor="#808890")
            axes.text(values[value] + error, place, "\N{NO-BREAK SPACE}" + form % values[value], va="center")
            place += 1
        ticks.append(place - (len(bars) + 1) / 2)
        place += 0.7
    axes.set_yticks(ticks, list(tools))
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.set_xticks([])
    axes.margins(x=0.2)
    axes.set_title(title + "\n(lower is better)", fontsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)


def main():
    tools = read(sys.stdin)
    figure, (full, thousand) = plt.subplots(1, 2, figsize=(8.4, 3.6), sharey=True, layout="constrained")
    draw(full, tools, "CPU time per connection, at full load", "%.1f \N{MICRO SIGN}s", 0, spread=1)
    draw(thousand, tools, "CPU at 1,000 connections per second", "%.1f %%", 2)
    full.invert_yaxis()
    figure.legend([plt.Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()], list(COLORS),
                  loc="center right", frameon=False)
    figure.savefig(sys.argv[1], transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
