"""Tables of Markdown, aligned so that they read well in a terminal too: of any rows, and of what the runs measured."""

from collections.abc import Iterable, Sequence

from benchmarks.harness.layers import OURS, Setting
from benchmarks.harness.results import FORWARD, Goal, Limits, Median, Results, dtype_name
from benchmarks.harness.timing import QUIET


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


def product_unit(limits: Limits) -> tuple[float, str]:
    """GFLOP/s, or TFLOP/s where a machine has many, and how to call them."""
    return (1e3, "TFLOP/s") if limits.gflop_s > 1e5 else (1.0, "GFLOP/s")


def limits_table(results: Results) -> str:
    rows = []
    for dtype, limits in results.limits.items():
        unit, name = product_unit(limits)
        product = f"{limits.gflop_s / unit:.1f} {name} ({limits.product})"
        rows.append([dtype, f"{limits.gb_s:.1f} GB/s ({limits.bandwidth})", product])
    return table(["this machine's limits", "bytes", "products"], rows)


def _versus(median: Median | None, ours: Median | None) -> str:
    if median is None:
        return ""
    ratio = f" ({median.milliseconds / ours.milliseconds:.2f})" if ours else ""
    return milliseconds(median.milliseconds) + ratio


def layer_tables(results: Results, kind: str) -> list[str]:
    """One for each size and direction: contestants down, tokens across."""
    shown = []
    sizes = [(m.width, m.n_keys, m.value_dim, m.dtype, m.direction) for m in results.where(kind=kind)]
    for width, n_keys, value_dim, dtype, direction in dict.fromkeys(sizes):
        wanted = {"kind": kind, "width": width, "n_keys": n_keys, "dtype": dtype, "direction": direction}
        medians: list[Median] = results.where(**wanted)
        by_tokens = {count: results.by_name(**wanted, tokens=count) for count in sorted({m.tokens for m in medians})}
        rows = [
            [name, *(_versus(case.get(name), case.get(OURS)) for case in by_tokens.values())]
            for name in dict.fromkeys(m.name for m in medians)
        ]
        title = f"{direction}, {dtype}, d = {width}, n = {n_keys} ({n_keys**2:,} slots), value_dim = {value_dim}"
        header = ["ms (multiple of memcompile's)", *map(of_tokens, by_tokens)]
        shown.append(f"{title}\n\n{table(header, rows)}")
    return shown


def _shares(m: Median, limits: Limits) -> list[str]:
    unit, _ = product_unit(limits)
    products = f"{m.gflop_s / unit:.1f} ({m.gflop_s / limits.gflop_s:4.0%})" if m.flops else ""
    return [f"{m.gb_s:.1f} ({m.gb_s / limits.gb_s:4.0%})", products]


def part_tables(results: Results, kinds: Iterable[str]) -> list[str]:
    """Parts of a layer and what they reach of the limits, one table for each kind and size."""
    shown = []
    for kind in kinds:
        sizes = [(m.width, m.n_keys, m.value_dim, m.tokens, m.dtype) for m in results.where(kind=kind)]
        for width, n_keys, value_dim, tokens, dtype in dict.fromkeys(sizes):
            case = results.by_name(kind=kind, width=width, n_keys=n_keys, tokens=tokens, dtype=dtype)
            limits = results.limits[dtype]
            rows = [[name, _versus(m, case.get(OURS)), *_shares(m, limits)] for name, m in case.items()]
            title = f"{kind}, d = {width}, n = {n_keys}, value_dim = {value_dim}, {of_tokens(tokens)}"
            header = ["ms (multiple of memcompile's)", "GB/s (share)", f"{product_unit(limits)[1]} (share)"]
            shown.append(f"{title}\n\n{table(['', *header], rows)}")
    return shown


def rates_table(results: Results, kind: str, main: Setting, tokens: int) -> list[str]:
    """What the forward of the main layer reaches of the limits, by the FLOPs and bytes that it needs at least.

    Rows are known only after the search and projected only after they are read: the last column is the time for both
    at the limits as a share of the time that it takes.
    """
    dtype = dtype_name(main.dtype)
    limits, case = results.limits.get(dtype), forward_case(results, kind, main, tokens)
    if limits is None or not case:
        return []
    rows = []
    for name, m in case.items():
        both = f"{m.gb_s / limits.gb_s + m.gflop_s / limits.gflop_s:.0%}"
        rows.append([name, milliseconds(m.milliseconds), *_shares(m, limits), both])
    title = f"forward, {dtype}, d = {main.width}, n = {main.n_keys}, {of_tokens(tokens)}"
    header = ["shares of the limits", "ms", "GB/s", product_unit(limits)[1], "one after the other"]
    return [f"{title}\n\n{table(header, rows)}"]


def forward_case(results: Results, kind: str, main: Setting, tokens: int) -> dict[str, Median]:
    """The contestants in the forward of the main layer, by name."""
    sizes = {"width": main.width, "n_keys": main.n_keys, "dtype": dtype_name(main.dtype)}
    return results.by_name(kind=kind, tokens=tokens, direction=FORWARD, **sizes)


def goal_tables(goals: Sequence[Goal], title: str) -> list[str]:
    """What was reached for each dtype."""
    dtypes = list(dict.fromkeys(goal.dtype for goal in goals))
    rows = []
    for name, asked in dict.fromkeys((goal.name, goal.asked) for goal in goals):
        reached = {g.dtype: f"{g.reached} {'yes' if g.met else 'NO'}" for g in goals if g.name == name}
        rows.append([name, asked, *(reached.get(dtype, "") for dtype in dtypes)])
    return [f"{title}\n\n{table(['goal', 'asked', *dtypes], rows)}"] if rows else []


def remarks(results: Results) -> list[str]:
    """What is missing, and whether other processes disturbed the run."""
    shown = []
    if results.missing:
        rows = [[m.case, m.name, m.reason] for m in results.missing]
        shown.append(f"not measured\n\n{table(['case', 'contestant', 'reason'], rows)}")
    if results.others.share > QUIET:
        shown.append(
            f"Other processes took {results.others.share:.0%} of the processors during the measurements, and threads "
            "that wait for each other lose more than that: measure again on an idle machine."
        )
    return shown


def about_cpu(results: Results) -> str:
    about = results.machine
    return f"{about['cpu']}, {about['capability']}, {about['threads']} threads, torch {about['torch']}"
