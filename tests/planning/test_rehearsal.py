"""Rehearsal: what the detector proves and a stand-in cannot run is refused before anything of the model changes."""

import pytest
import torch
from torch import nn

import memcompile
from memcompile.common.pipeline import Pipeline
from memcompile.errors import PlanError
from memcompile.passes.detect.detect import find_in_model
from memcompile.planning.rehearsal import rehearse
from memcompile.runtime.install import counting_stand_ins
from memcompile.runtime.stand_ins.operations import Operations
from tests.models import ZOO, around, plain_ffn
from tests.planned import MEMORY


class StrictFfn(nn.Module):
    """Token-wise in the graph, but written so that between the projections only a tensor will do."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        hidden = self.up(x)
        if not isinstance(hidden, torch.Tensor):
            raise TypeError("expected a tensor")
        return self.down(hidden.relu())


class SkippingFfn(StrictFfn):
    """Takes a path of its own where it meets something else than a tensor."""

    def forward(self, x):
        hidden = self.up(x)
        return self.down(hidden.relu()) if isinstance(hidden, torch.Tensor) else x


def mixed(strict: type[nn.Module] = StrictFfn) -> nn.Module:
    kinds = iter([plain_ffn, strict, plain_ffn, plain_ffn])
    return around(lambda width, hidden: next(kinds)(width, hidden))


def rehearsed(model: nn.Module, adds: bool = False, example_inputs=None) -> dict[str, str]:
    captures, blocks = find_in_model(Pipeline("find"), model, example_inputs)
    sites = [block.site for block in blocks if block.site.refusal is None]
    assert sites
    return rehearse(model, captures, sites, adds).failures


@pytest.mark.parametrize("adds", [False, True], ids=["replace", "add"])
@pytest.mark.parametrize("name", ZOO)
def test_every_spelling_of_the_zoo_passes(name, adds):
    model, inputs = ZOO[name]()
    assert rehearsed(model, adds, inputs) == {}


@pytest.mark.parametrize(
    ("strict", "sentence"), [(StrictFfn, "TypeError: expected a tensor"), (SkippingFfn, "ran 0 times with a stand-in")]
)
def test_the_block_that_fails_is_named(strict, sentence):
    (failure,) = rehearsed(mixed(strict)).items()
    assert failure[0] == "blocks.1.ffn.down.weight"
    assert sentence in failure[1]


def test_a_number_of_layers_passes_over_it():
    model = mixed()
    explanation = memcompile.plan(model, memory_layers="all", **MEMORY)
    assert [row.chosen for row in explanation.rows] == [True, False, True, True]
    assert "expected a tensor" in explanation.rows[1].reason


def test_its_name_is_an_error_and_the_model_stays():
    model = mixed()
    before = {name: (id(p), type(m)) for m in model.modules() for name, p in m.named_parameters()}
    keys = list(model.state_dict())
    with pytest.raises(PlanError, match=r"'blocks.1.ffn' cannot become a memory: .*expected a tensor"):
        memcompile.plan(model, memory_layers=["blocks.1.ffn"], **MEMORY)
    assert list(model.state_dict()) == keys
    assert {name: (id(p), type(m)) for m in model.modules() for name, p in m.named_parameters()} == before


@pytest.mark.parametrize("adds", [False, True], ids=["replace", "add"])
def test_counting_stand_ins_leave_no_trace(adds):
    model, inputs = ZOO["inner_norm"]()
    sites = memcompile.find_ffns(model, inputs)
    state = [(type(m), list(m.__dict__), list(m._parameters.items())) for m in model.modules()]
    operations = {site.down: Operations() for site in sites}
    with pytest.raises(ZeroDivisionError), counting_stand_ins(model, sites, adds, operations):
        1 / 0  # noqa: B018
    assert [(type(m), list(m.__dict__), list(m._parameters.items())) for m in model.modules()] == state
