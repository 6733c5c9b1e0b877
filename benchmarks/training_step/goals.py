"""What a training step is to cost on any machine, as ratios of figures that are measured side by side."""

from collections.abc import Callable

from benchmarks.common.results import Goal
from benchmarks.training_step.cases import DENSE, FUSED, HARDWARE, OURS, Group
from benchmarks.training_step.results import Median, Results
from benchmarks.training_step.worker import STEP, TABLE

NOT_MEASURED = ("not measured", False)


def growth(curve: dict[int, Median]) -> float | None:
    """How much longer it takes with the most slots than with the fewest: 0.1 is 10% longer. None where there is one."""
    few, many = min(curve, default=0), max(curve, default=0)
    return curve[many].ffns / curve[few].ffns - 1 if few < many else None


def growth_beyond(ours: float, hardware: float) -> float:
    """What is left of a growth where the hardware's is taken out."""
    return (1 + ours) / (1 + hardware) - 1


def judge(results: Results, curve: Group, main: Group) -> list[Goal]:
    """All goals; one whose figures are missing is not met."""
    goals = [_growth_goal(results, curve)]
    steps = results.of(main.width, STEP)
    slots = main.n_keys[-1] ** 2

    def add(name: str, asked: str, others: tuple[str, ...], verdict: Callable[..., tuple[str, bool]]) -> None:
        found = [steps.get(other, {}).get(slots) for other in others]
        reached, met = NOT_MEASURED if None in found else verdict(*found)
        goals.append(Goal(name, asked, "float32", reached, met))

    def times_as_fast(ours: Median, dense: Median) -> tuple[str, bool]:
        ratio = dense.ffns / ours.ffns
        return f"{ratio:.1f} x ({ours.milliseconds:.0f} against {dense.milliseconds:.0f} ms)", ratio >= 20

    def multiple(ours: Median) -> tuple[str, bool]:
        return f"{ours.ffns:.2f} x ({ours.milliseconds:.0f} against {ours.ffn_milliseconds:.0f} ms)", ours.ffns <= 1.1

    def peak(ours: Median) -> tuple[str, bool]:
        over = ours.peak_bytes / ours.needed_bytes - 1
        return f"+ {over:.1%} ({ours.peak_bytes / 2**30:.2f} of {ours.needed_bytes / 2**30:.2f} GiB)", over < 0.1

    for name in (OURS, FUSED):
        add(f"{name}: step, times as fast as {DENSE}", ">= 20 x", (name, DENSE), times_as_fast)
        add(f"{name}: step, time as a multiple of the FFN's", "<= 1.1 x", (name,), multiple)
        add(f"{name}: peak memory beyond values and states", "< 10 %", (name,), peak)
    return goals


def _growth_goal(results: Results, curve: Group) -> Goal:
    """Of the table part: the search grows with the half-keys, and the rows that a step touches with the slots."""
    tables = results.of(curve.width, TABLE)
    ours, hardware = growth(tables.get(OURS, {})), growth(tables.get(HARDWARE, {}))
    few, many = curve.n_keys[0] ** 2, curve.n_keys[-1] ** 2
    name = f"{OURS}: table part, growth from {few:,} to {many:,} slots beyond the hardware's"
    if ours is None or hardware is None:
        return Goal(name, "< 15 %", "float32", *NOT_MEASURED)
    beyond = growth_beyond(ours, hardware)
    reached = f"{beyond:+.0%} ({ours:+.0%}; the hardware's {hardware:+.0%})"
    return Goal(name, "< 15 %", "float32", reached, beyond < 0.15)
