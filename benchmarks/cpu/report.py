"""The results as tables, the goals last, where a terminal shows them."""

from benchmarks.common.results import BACKWARD, FORWARD
from benchmarks.common.tables import goal_table, milliseconds, of_tokens, table
from benchmarks.cpu.neighbours import QUIET
from benchmarks.cpu.results import Results


def _case_tables(results: Results) -> list[str]:
    shown = []
    keys = dict.fromkeys((m.width, m.n_keys, m.dtype) for m in results.medians if m.n_keys)
    for width, n_keys, dtype in keys:
        for direction in (FORWARD, BACKWARD):
            medians = results.of(width, n_keys, dtype, direction)
            if not medians:
                continue
            tokens = sorted({m.tokens for m in medians})
            by_case = {(m.name, m.tokens): m.milliseconds for m in medians}
            rows = []
            for name in dict.fromkeys(m.name for m in medians):
                cells = [name]
                for count in tokens:
                    value, ours = by_case.get((name, count)), by_case.get(("memcompile", count))
                    ratio = f" ({value / ours:4.2f})" if value and ours else ""
                    cells.append(f"{milliseconds(value)}{ratio}" if value else "")
                rows.append(cells)
            title = f"{direction}, {dtype}, d = {width}, n = {n_keys} ({n_keys**2:,} slots)"
            header = ["ms (multiple of memcompile's)"] + [of_tokens(n) for n in tokens]
            shown.append(f"{title}\n\n{table(header, rows)}")
    return shown


def _limits(results: Results) -> str:
    rows = []
    for dtype, limits in results.limits.items():
        prefetch = "with" if limits.gather_prefetched else "without"
        rows.append(
            [dtype, f"{limits.gather_gb_s:.1f} ({prefetch} prefetch)", f"{limits.gemm_gflop_s:.0f} ({limits.gemm})"]
        )
    header = ["this machine's limits", "random rows, GB/s", "GEMM, GFLOP/s"]
    return table(header, rows)


def _rates(results: Results) -> list[str]:
    """What the forward of the main setting reaches of the limits, by the FLOPs and bytes that it cannot do without.

    Rows are known only after the search and projected only after they are read: the last column is the time for both
    at the limits as a share of the time that it takes.
    """
    shown = []
    for dtype, limits in results.limits.items():
        rows = [
            [
                m.name,
                milliseconds(m.milliseconds),
                f"{m.gb_s:.1f} ({m.gb_s / limits.gather_gb_s:4.0%})",
                f"{m.gflop_s:.0f} ({m.gflop_s / limits.gemm_gflop_s:4.0%})",
                f"{m.gb_s / limits.gather_gb_s + m.gflop_s / limits.gemm_gflop_s:.0%}",
            ]
            for m in results.of_main(dtype, FORWARD, results.main_tokens).values()
        ]
        title = f"forward, {dtype}, d = {results.main.width}, n = {results.main.n_keys}, {results.main_tokens} tokens"
        if rows:
            header = ["shares of the limits", "ms", "GB/s", "GFLOP/s", "one after the other"]
            shown.append(f"{title}\n\n{table(header, rows)}")
    return shown


def _goals(results: Results) -> str:
    title = f"goals at d = {results.main.width}, n = {results.main.n_keys}, {results.main_tokens} tokens: reached?"
    return f"{title}\n\n{goal_table(results.goals)}"


def render(results: Results) -> str:
    """Everything."""
    about = results.machine
    first = f"{about['cpu']}, {about['capability']}, {about['threads']} threads, torch {about['torch']}"
    parts = [first, "Values' gradient excluded: no contestant computes that of its table."]
    if results.limits:
        parts += [_limits(results)]
    parts += _case_tables(results) + _rates(results)
    if results.goals:
        parts.append(_goals(results))
    if results.neighbours.share > QUIET:
        parts.append(
            f"Other processes took {results.neighbours.share:.0%} of the processors while the layers were timed, and "
            "threads that wait for each other lose more than that: measure again on an idle machine."
        )
    return "\n\n".join(parts)
