"""The results as tables, the goals last, where a terminal shows them."""

from benchmarks.common.results import BACKWARD, FORWARD
from benchmarks.common.tables import goal_table, milliseconds, of_tokens, table
from benchmarks.gpu.case import FROZEN, LAYER, OURS
from benchmarks.gpu.results import Median, Results

NOTES = (
    "Times are the device's, by CUDA events: the second-level cache holds other data before a call, and the host has "
    "launched the call when it begins, as under CUDA graphs. Medians of contestants that take turns. "
    "Scores of the peers are fp32 products by TF32, which is exact for half dtypes. The gradient of the values is "
    f"dense for every memory layer: '{BACKWARD}' has it, '{FROZEN}' does without."
)


def _ratio(value: Median, ours: Median | None) -> str:
    return f" ({value.milliseconds / ours.milliseconds:5.2f})" if ours else ""


def _parts(results: Results) -> list[str]:
    """Gathers, searches and updates, with what they reach of the limits."""
    assert results.limits is not None
    shown = []
    others = [m for m in results.medians if m.kind != LAYER]
    for key in dict.fromkeys((m.kind, m.width, m.n_keys, m.value_dim, m.tokens) for m in others):
        kind, width, n_keys, value_dim, tokens = key
        case = {m.name: m for m in others if (m.kind, m.width, m.n_keys, m.value_dim, m.tokens) == key}
        rows = [
            [
                name,
                milliseconds(m.milliseconds) + _ratio(m, case.get(OURS)),
                f"{m.gb_s:.0f} ({m.gb_s / results.limits.copy_gb_s:4.0%})",
                f"{m.gflop_s / 1e3:.1f} ({m.gflop_s / 1e3 / results.limits.gemm_tflop_s:4.0%})" if m.flops else "",
            ]
            for name, m in case.items()
        ]
        title = f"{kind}, d = {width}, n = {n_keys}, value_dim = {value_dim}, {of_tokens(tokens)}"
        header = ["", "ms (multiple of memcompile's)", "GB/s (share of copy)", "TFLOP/s (share of GEMM)"]
        shown.append(f"{title}\n\n{table(header, rows)}")
    return shown


def _layers(results: Results) -> list[str]:
    """One table a layer: contestants down, directions and tokens across."""
    shown = []
    layers = [m for m in results.medians if m.kind == LAYER]
    for key in dict.fromkeys((m.width, m.n_keys, m.value_dim) for m in layers):
        width, n_keys, value_dim = key
        mine = [m for m in layers if (m.width, m.n_keys, m.value_dim) == key]
        by_case = {(m.name, m.direction, m.tokens): m for m in mine}
        for direction in (FORWARD, BACKWARD, FROZEN):
            tokens = sorted({m.tokens for m in mine if m.direction == direction})
            if not tokens:
                continue
            rows = []
            for name in dict.fromkeys(m.name for m in mine):
                cells = [name]
                for count in tokens:
                    m, ours = by_case.get((name, direction, count)), by_case.get((OURS, direction, count))
                    cells.append(milliseconds(m.milliseconds) + _ratio(m, ours) if m else "")
                rows.append(cells)
            title = f"layer, {direction}, d = {width}, n = {n_keys} ({n_keys**2:,} slots), value_dim = {value_dim}"
            header = ["ms (multiple of memcompile's)"] + [of_tokens(n) for n in tokens]
            shown.append(f"{title}\n\n{table(header, rows)}")
    return shown


def _rates(results: Results) -> list[str]:
    """What the main layer's forward reaches of the limits, by the FLOPs and bytes that it cannot do without.

    Rows are known only after the search and projected only after they are read: the last column is the time for both
    at the limits as a share of the time that it takes.
    """
    if results.main is None or results.limits is None:
        return []
    main, limits, shown = results.main, results.limits, []
    for tokens in sorted({m.tokens for m in results.medians if m.kind == LAYER}):
        rows = []
        for name, m in results.of(LAYER, main, tokens, FORWARD).items():
            memory, arithmetic = m.gb_s / limits.copy_gb_s, m.gflop_s / 1e3 / limits.gemm_tflop_s
            shares = [f"{m.gb_s:.0f} ({memory:4.0%})", f"{m.gflop_s / 1e3:.1f} ({arithmetic:4.0%})"]
            rows.append([name, milliseconds(m.milliseconds), *shares, f"{memory + arithmetic:.0%}"])
        if rows:
            header = ["shares of the limits", "ms", "GB/s", "TFLOP/s", "one after the other"]
            shown.append(
                f"layer, forward, d = {main.width}, n = {main.n_keys}, {of_tokens(tokens)}\n\n{table(header, rows)}"
            )
    return shown


def render(results: Results) -> str:
    """Everything."""
    about = ", ".join(f"{k} {v:.0f}" if isinstance(v, float) else f"{k} {v}" for k, v in results.about.items())
    parts = [about, NOTES]
    if results.limits is not None:
        limits = [f"{results.limits.copy_gb_s:.0f}", f"{results.limits.gemm_tflop_s:.1f}"]
        parts.append(table(["this device's limits", "GB/s", "TFLOP/s"], [["large copy; square GEMM", *limits]]))
        parts += _parts(results)
    parts += _layers(results) + _rates(results)
    if results.failures:
        rows = [[f.case, f.name, f.error] for f in results.failures]
        parts.append(f"failed\n\n{table(['case', 'contestant', 'error'], rows)}")
    if results.skipped:
        parts.append(f"not measured\n\n{table(['case', 'reason'], [[s.case, s.reason] for s in results.skipped])}")
    if results.goals and results.main:
        main = results.main
        parts.append(
            f"goals at d = {main.width}, n = {main.n_keys}, value_dim = {main.value_dim}: reached?\n\n"
            f"{goal_table(results.goals)}"
        )
    return "\n\n".join(parts)
