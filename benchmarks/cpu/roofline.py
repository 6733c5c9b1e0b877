"""The roofline of the CPU: one panel a dtype."""

from pathlib import Path

from benchmarks.common.results import FORWARD
from benchmarks.common.roofline import LIBRARY, OURS, SAME_LAYER, Panel, Style, draw_roofline
from benchmarks.cpu.results import Results

_STYLES: dict[str, Style] = {
    "memcompile": (OURS, "*"),
    "eager": (SAME_LAYER, "o"),
    "Inductor": (SAME_LAYER, "s"),
    "Inductor, naive gather": (SAME_LAYER, "D"),
    "product-key-memory": (LIBRARY, "o"),
    "PEER-pytorch": (LIBRARY, "s"),
}


def draw(results: Results, path: Path) -> bool:
    """The forward of the main setting. Returns whether there was anything to draw."""
    tokens, main = results.main_tokens, results.main
    panels = []
    for dtype, limits in results.limits.items():
        medians = [*results.of_main(dtype, FORWARD, tokens).values()]
        if medians:
            gemm = f"GEMM ({limits.gemm})"
            panels.append(Panel(dtype, limits.gather_gb_s, "random rows", limits.gemm_gflop_s, gemm, medians))
    if not panels:
        return False
    title = (
        f"A layer's forward under the roofs of this machine: {tokens} tokens, d = {main.width}, "
        f"{main.num_slots:,} slots\n{results.machine['cpu']}, {results.machine['threads']} threads"
    )
    draw_roofline(panels, title, _STYLES, path)
    return True
