"""A forward that is only for planning leaves everything as it was, wherever the model's code keeps things."""

import gc
import logging
import random
import threading

import pytest
import torch
from torch import nn

import memcompile
from memcompile.errors import PlanError
from memcompile.passes._torch import FakeTensor
from memcompile.passes.capture.trace import trace
from tests.keepers import KEEPERS, Keeping, places
from tests.models import BATCH, TIME, VOCABULARY, WIDTH, Block, Transformer, plain_ffn, tiny_gpt
from tests.planned import MEMORY

TOKENS = torch.randint(VOCABULARY, (BATCH, TIME), generator=torch.Generator().manual_seed(0))


def fakes() -> list[FakeTensor]:
    gc.collect()
    return [o for o in gc.get_objects() if type(o) is FakeTensor]


@pytest.mark.parametrize("by_value", [False, True], ids=["fake", "computed"])
@pytest.mark.parametrize("kind", KEEPERS)
def test_what_a_forward_keeps_is_as_it_was(kind, by_value):
    if kind == "draws" and torch.__version__ < "2.12":
        pytest.skip("graphs of torch 2.11 take no generators")
    model = Keeping([KEEPERS[kind]()], by_value)
    before = places(model)
    graphs = trace(model, (TOKENS,))
    assert [(c.path, c.forward.compute) for c in graphs] == [("", by_value)]
    assert places(model) == before
    del graphs
    assert not fakes()


@pytest.mark.parametrize("kind", ["attribute", "globals"])
def test_what_was_kept_before_stays(kind):
    model = Keeping([KEEPERS[kind]()])
    output, before = model(TOKENS), places(model)
    memcompile.plan(model, memory_layers=1, **MEMORY)
    assert places(model)[:-1] == before[:-1]  # the last is PyTorch's stream, which the memory is drawn from
    assert type(model(TOKENS)) is torch.Tensor and output.shape == model(TOKENS).shape


def test_a_planned_model_with_a_cache_trains():
    model = Keeping([KEEPERS["attribute"](), KEEPERS["default"]()])
    memcompile.plan(model, memory_layers=1, **MEMORY)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(TOKENS).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if "positions" not in name)


def yielding(x=None):
    while True:
        x = yield x


class Generating:
    def __init__(self):
        self.generator = yielding()
        next(self.generator)

    def __call__(self, x):
        return x + self.generator.send(x * 2)


def test_a_generator_that_advances_is_refused():
    model = Keeping([Generating()])
    names = list(model.state_dict())
    with pytest.raises(PlanError, match=r"advances <generator object yielding .* cannot turn back"):
        memcompile.plan(model, memory_layers=1, **MEMORY)
    assert list(model.state_dict()) == names


class Hidden:
    """Keeps it where no code is read: in an object of the standard library."""

    def __call__(self, x):
        LOGGER.kept = x * 2
        return x


LOGGER = logging.getLogger("tests.kept")


def test_what_cannot_be_put_back_is_told_before_anything_changes():
    model = Keeping([Hidden()])
    names = list(model.state_dict())
    try:
        with pytest.raises(PlanError, match=r"keeps a tensor in an object of logging.Logger"):
            memcompile.plan(model, memory_layers=1, **MEMORY)
    finally:
        del LOGGER.kept
    assert list(model.state_dict()) == names


def test_a_module_sees_an_attribute_that_its_code_looks_up_by_a_string():
    class Named(Transformer):
        def forward(self, tokens):
            setattr(type(self), "last", tokens)  # noqa: B010
            return super().forward(tokens)

    trace(Named([Block(WIDTH, plain_ffn(WIDTH, 80))]), (TOKENS,))
    assert not hasattr(Named, "last")


# --- other threads -----------------------------------------------------------------------------------------------


class Meanwhile(nn.Module):
    """Lets another thread run in the middle of its forward."""

    def __init__(self):
        super().__init__()
        self.body, self.go, self.done = tiny_gpt(layers=2), threading.Event(), threading.Event()

    def forward(self, tokens):
        self.go.set()
        self.done.wait(60)  # without an assert, which reads code of pytest
        self.done.clear()
        return self.body(tokens)


def in_between(does):
    """What ``does`` returns where another thread calls it before, in the middle of and after the forwards of a plan."""
    model = Meanwhile()
    torch.manual_seed(0)
    random.seed(0)
    results = [does()]
    ends = False

    def run():
        while model.go.wait(60) and not ends:
            model.go.clear()
            results.append(does())
            model.done.set()

    other = threading.Thread(target=run)
    other.start()
    memcompile.find_ffns(model, (TOKENS,))
    assert len(results) == 2
    ends = True
    model.go.set()
    other.join()
    return [*results, does()]


@pytest.mark.parametrize("draw", [lambda: torch.rand(()).item(), random.random], ids=["torch", "random"])
def test_another_thread_goes_on_in_its_stream(draw):
    drawn = in_between(draw)
    torch.manual_seed(0)
    random.seed(0)
    assert drawn == [draw() for _ in drawn]


def test_another_threads_data_is_its_data():
    def versions():
        parameter = torch.ones(2, requires_grad=True)
        parameter.data.add_(1)  # a detached alias would raise the version
        return parameter._version

    assert set(in_between(versions)) == {0}


def test_two_plans_at_once_leave_torch_as_it_was():
    def state():
        return torch.Tensor.__dict__.get("data"), torch.autograd.Function.__dict__["apply"]

    before = state()
    models = [tiny_gpt(layers=2) for _ in range(3)]
    threads = [threading.Thread(target=memcompile.find_ffns, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert state() == before
