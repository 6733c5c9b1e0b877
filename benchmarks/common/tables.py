"""Tables of Markdown, aligned so that they read well in a terminal too."""

from collections.abc import Sequence

from benchmarks.common.results import Goal


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = "|" + "|".join("-" * (width + 1) + ("-:"[i > 0]) for i, width in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def of_tokens(count: int) -> str:
    return f"{count} token{'s' * (count != 1)}"


def milliseconds(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def goal_table(goals: Sequence[Goal]) -> str:
    """What was reached for each dtype."""
    dtypes = list(dict.fromkeys(goal.dtype for goal in goals))
    rows = []
    for name, asked in dict.fromkeys((goal.name, goal.asked) for goal in goals):
        reached = {g.dtype: f"{g.reached} {'yes' if g.met else 'NO'}" for g in goals if g.name == name}
        rows.append([name, asked, *(reached.get(dtype, "") for dtype in dtypes)])
    return table(["goal", "asked", *dtypes], rows)
