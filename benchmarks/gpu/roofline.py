"""The roofline of a GPU: the main layer's forward, one panel a number of tokens."""

from pathlib import Path

from benchmarks.common.results import FORWARD
from benchmarks.common.roofline import OURS as OUR_COLOUR
from benchmarks.common.roofline import SAME_LAYER, Panel, Style, draw_roofline
from benchmarks.common.tables import of_tokens
from benchmarks.gpu.case import LAYER, OURS
from benchmarks.gpu.layers import EAGER, EAGER_BAG
from benchmarks.gpu.results import Results

_STYLES: dict[str, Style] = {
    OURS: (OUR_COLOUR, "*"),
    EAGER: (SAME_LAYER, "o"),
    EAGER_BAG: (SAME_LAYER, "v"),
    "Inductor": (SAME_LAYER, "s"),
    "Inductor, F.embedding_bag": (SAME_LAYER, "D"),
}
MOST_PANELS = 2


def draw(results: Results, path: Path) -> bool:
    """Returns whether there was anything to draw."""
    if results.main is None or results.limits is None:
        return False
    main, limits, panels = results.main, results.limits, []
    for tokens in sorted({m.tokens for m in results.medians if m.kind == LAYER}, reverse=True)[:MOST_PANELS]:
        rates = [*results.of(LAYER, main, tokens, FORWARD).values()]
        if rates:
            roofs = limits.copy_gb_s, "large copy", limits.gemm_tflop_s * 1e3, "GEMM"
            panels.append(Panel(of_tokens(tokens), *roofs, rates))
    if not panels:
        return False
    title = (
        f"A layer's forward under the roofs of this device: d = {main.width}, {main.num_slots:,} slots, "
        f"value_dim = {main.value_dim}\n{results.about.get('device', '')}"
    )
    draw_roofline(panels, title, _STYLES, path)
    return True
