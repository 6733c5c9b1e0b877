"""Property: whatever a model keeps, in whatever dtypes and branches its FFNs run, a plan changes its FFNs alone."""

import gc

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import memcompile
from memcompile.errors import PlanError
from memcompile.passes._torch import FakeTensor
from tests.keepers import KEEPERS, Keeping, places
from tests.models import BATCH, TIME, VOCABULARY, WIDTH
from tests.planned import MEMORY
from tests.planning.test_rehearsal import MixedFfn, both_ways, detached, in_inference_mode, without_grad

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# How the second block runs: a name, and whether a gradient reaches it.
WAYS = {"plainly": (None, True), "both": (both_ways, True)}
WAYS |= {f.__name__: (f, False) for f in (detached, in_inference_mode, without_grad)}


class Adapter(torch.nn.Module):
    """Stands behind an FFN, in series, and reads its output twice."""

    def __init__(self, ffn: torch.nn.Module) -> None:
        super().__init__()
        self.ffn, self.narrow, self.wide = ffn, torch.nn.Linear(WIDTH, 4), torch.nn.Linear(4, WIDTH)

    def forward(self, x):
        y = self.ffn(x)
        return y + self.wide(self.narrow(y).relu())


class Branching(torch.nn.Module):
    def __init__(self, block: torch.nn.Module, way: str) -> None:
        super().__init__()
        self.block, self.way = block, way

    def forward(self, x):
        how, _ = WAYS[self.way]
        return self.block(x) if how is None else how(self.block, x)


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kinds=st.lists(st.sampled_from(list(KEEPERS)), max_size=3, unique=True),
    dtypes=st.lists(st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)), min_size=2, max_size=2),
    way=st.sampled_from(list(WAYS)),
    adapter=st.booleans(),
    placement=st.sampled_from(["replace", "add"]),
    by_value=st.booleans(),
)
def test_a_plan_changes_its_ffns_alone(kinds, dtypes, way, adapter, placement, by_value):
    torch.manual_seed(0)
    model = Keeping([KEEPERS[kind]() for kind in kinds], by_value)
    for block, (up, down) in zip(model.blocks, dtypes, strict=True):
        block.ffn = MixedFfn(up, down)
    if adapter:
        model.blocks[0].ffn = Adapter(model.blocks[0].ffn)
    model.blocks[1] = Branching(model.blocks[1], way)
    tokens = torch.randint(VOCABULARY, (BATCH, TIME))
    names, before = dict(model.named_parameters()), places(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    trained = [not adapter, WAYS[way][1]]
    try:
        rows = memcompile.plan(model, memory_layers="all", placement=placement, example_inputs=(tokens,), **MEMORY).rows
    except PlanError:
        assert not any(trained)
        rows = ()
    assert places(model)[:-1] == before[:-1]
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is FakeTensor]
    chosen = {name.partition(".ffn")[0] for row in rows if row.chosen for name in [row.site.down]}
    assert chosen == {path for path, reached in zip(["blocks.0", "blocks.1.block"], trained, strict=True) if reached}
    kept = {name for name in names if placement == "add" or not any(name.startswith(f"{c}.ffn") for c in chosen)}
    now = dict(model.named_parameters())
    assert all(now[name] is names[name] and torch.equal(now[name], state[name]) for name in kept)
    output = model(tokens)
    assert type(output) is torch.Tensor and output.dtype == torch.float32
    output.sum().backward()
    assert all(p.grad is not None for name, p in now.items() if ".memory." in name)
