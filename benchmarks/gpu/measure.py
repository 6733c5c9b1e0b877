"""Runs a plan: the limits, then group after group. What fails is recorded, and the run goes on."""

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import nn

from benchmarks.gpu.device import Gpu
from benchmarks.gpu.parts import gather_case, scored_search_case, search_case, update_case
from benchmarks.gpu.plan import SHARE_OF_MEMORY, Group, Plan, fitting_setting
from benchmarks.harness.compare import Case, Comparison, layer_case
from benchmarks.harness.layers import Contestant, Setting, bag, fill_table, gelu_ffn, memory_layers, naive, swiglu_ffn
from benchmarks.harness.results import BACKWARD, FORWARD, FROZEN, Limits, dtype_name
from benchmarks.harness.session import Session
from benchmarks.harness.timing import Rounds, in_turns

LAYER = "layer"
EAGER, EAGER_BAG, INDUCTOR, INDUCTOR_BAG = "eager", "eager, F.embedding_bag", "Inductor", "Inductor, F.embedding_bag"
HIDDEN_MULTIPLE = 64
ROUNDS = Rounds(seconds=0.2, fewest=5, most=25)
WARM_UPS = 2
REPETITIONS = 21  # of what gives the limits


def measure(device: Gpu, plan: Plan, session: Session) -> None:
    session.say("this device's limits")
    comparison = Comparison(device, session, ROUNDS, WARM_UPS, time.perf_counter() + 60 * plan.minutes)
    session.results.limits[dtype_name(plan.dtype)] = limits(device, plan)
    for group in plan.groups:
        setting = fitting_setting(group, plan, device.free_bytes())
        if setting is None:
            reason = f"its table and the table's gradient exceed {SHARE_OF_MEMORY:.0%} of the free memory"
            session.miss(str(group), "", reason)
            session.advance(group.cases)
            continue
        session.say(f"{group}: filling the table")
        try:
            measure_group(device, plan, group, setting, comparison)
        except Exception as error:
            session.miss(str(group), "", error)
        torch._dynamo.reset()  # what was compiled keeps the parameters of this group alive
        device.tidy()


def measure_group(device: Gpu, plan: Plan, group: Group, setting: Setting, comparison: Comparison) -> None:
    torch.manual_seed(0)
    shape, where = (setting.num_slots, setting.value_dim), device.torch_device
    table = nn.Parameter(torch.empty(shape, dtype=setting.dtype, device=where))
    with torch.no_grad():
        fill_table(table)
    if group.parts:
        tokens, peers = group.tokens[0], plan.all_peers
        makers: list[Callable[[], Case]] = [
            partial(gather_case, setting, table, tokens, peers),
            partial(search_case, setting, where, tokens, peers),
            partial(scored_search_case, setting, where, tokens, peers),
            partial(update_case, setting, where, tokens, peers),
        ]
        for make in makers:  # one after the other: all inputs together would fill the memory
            comparison.measure([make()])
    contestants, same = layer_contestants(setting, table, plan.all_peers)
    case = partial(layer_case, LAYER, setting, where, contestants, same, EAGER_BAG, table=table)
    cases = [case(tokens, FORWARD) for tokens in group.tokens]
    cases += [case(tokens, BACKWARD) for tokens in group.backward_tokens]
    if group.frozen:
        cases.append(case(group.backward_tokens[0], FROZEN))
    comparison.measure(cases)


def layer_contestants(
    setting: Setting, table: nn.Parameter, all_peers: bool
) -> tuple[list[Contestant], frozenset[str]]:
    """All, and the names of those that compute the same."""
    under_inductor = {INDUCTOR: naive, INDUCTOR_BAG: bag} if all_peers else {}
    found = memory_layers(setting, table, {EAGER: naive, EAGER_BAG: bag}, under_inductor)
    with table.device:
        ffns = [swiglu_ffn(setting, HIDDEN_MULTIPLE)] + ([gelu_ffn(setting)] if all_peers else [])
    return found + ffns, frozenset(c.name for c in found)


def limits(device: Gpu, plan: Plan) -> Limits:
    """In turns, so that the clocks are those of a device at work."""
    copy_bytes, size, where = min(plan.copy_bytes, device.free_bytes() // 4), plan.gemm_size, device.torch_device
    source = torch.empty(copy_bytes, dtype=torch.uint8, device=where).random_()
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, device=where).to(plan.dtype) for _ in range(2))
    seconds = in_turns(
        REPETITIONS,
        partial(device.seconds, lambda: target.copy_(source)),
        partial(device.seconds, lambda: left @ right),
    )
    copy, product = (median(one[REPETITIONS // 4 :]) for one in seconds)  # without those that warm it up
    # A copy reads and writes its bytes.
    return Limits(2 * copy_bytes / copy / 1e9, "large copy", 2 * size**3 / product / 1e9, "GEMM")
