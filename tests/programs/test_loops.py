"""Training programs, each with the order of calls of a real one: they train, save, resume, and go on bit for bit."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import memcompile
from tests.models import VOCABULARY, tiny_gpt
from tests.planned import MEMORY, assert_same, batch, stop_before_inductor

LINE: dict[str, Any] = {"backend": "memcompile", "memory_layers": 2, "values_grad": "sparse", **MEMORY}


@pytest.fixture(autouse=True)
def _without_inductor(monkeypatch):
    stop_before_inductor(monkeypatch, lambda graph_module, inputs: graph_module.forward)


def fresh(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return tiny_gpt(layers=3)


def train(run: Callable, optimizer: Optimizer, steps: range, after: Callable[[], None] = lambda: None) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad(set_to_none=True)
        loss = run(*batch(step))
        loss.backward()
        optimizer.step()
        after()
        losses.append(loss.item())
    return losses


def through_a_file(checkpoint: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def loaded(saved: dict[str, Tensor]) -> nn.Module:
    """A new model, planned as the one that was saved, with its parameters."""
    model = fresh(1)
    memcompile.plan(model, memory=memcompile.config_from(saved))
    model.load_state_dict(saved)
    return model


def assert_resumes(run_of: Callable[..., Callable]) -> None:
    """Trains 6 steps, and again 3 of them from a checkpoint of the model and its optimizer after 3.

    Args:
        run_of: gives what the loop calls for a model, with the options of the line where it is planned there.
    """
    model = fresh(0)
    run = run_of(model, **LINE)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    train(run, optimizer, range(3))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    expected = train(run, optimizer, range(3, 6))

    resumed = loaded(saved["model"])
    optimizer = AdamW(resumed.parameters(), lr=1e-2)
    optimizer.load_state_dict(saved["optimizer"])
    assert train(run_of(resumed, backend="memcompile"), optimizer, range(3, 6)) == expected
    assert_same(resumed.state_dict(), model.state_dict())


def test_nanogpt():
    """The optimizer, with two groups, comes before the line; a checkpoint has names with `_orig_mod.` in them, which a
    resume takes off.
    """

    def configure(model: nn.Module) -> Optimizer:
        parameters = [p for p in model.parameters() if p.requires_grad]
        decay, rest = ([p for p in parameters if (p.dim() > 1) == matrices] for matrices in (True, False))
        return AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-2)

    def step_all(raw: nn.Module, run: nn.Module, optimizer: Optimizer, steps: range) -> list[float]:
        clip = functools.partial(nn.utils.clip_grad_norm_, raw.parameters(), 1.0)
        losses = []
        for step in steps:
            for micro in range(2):
                loss = run(*batch(2 * step + micro)) / 2
                loss.backward()
            clip()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.eval()
            with torch.no_grad():
                losses += [loss.item(), run(*batch(99)).item()]
            run.train()
        return losses

    model = fresh(0)
    optimizer = configure(model)
    compiled = torch.compile(model, **LINE)
    step_all(model, compiled, optimizer, range(3))
    saved = through_a_file({"model": compiled.state_dict(), "optimizer": optimizer.state_dict()})
    expected = step_all(model, compiled, optimizer, range(3, 6))

    state = {name.removeprefix("_orig_mod."): value for name, value in saved["model"].items()}
    resumed = loaded(state)
    optimizer = configure(resumed)
    optimizer.load_state_dict(saved["optimizer"])
    assert step_all(resumed, torch.compile(resumed, backend="memcompile"), optimizer, range(3, 6)) == expected
    assert_same(resumed.state_dict(), model.state_dict())


def test_blocks_that_are_compiled_one_by_one():
    """Regional compilation: the whole is planned, then each block is compiled."""

    def run_of(model: nn.Module, backend: str, **options: Any) -> nn.Module:
        if options:
            memcompile.plan(model, **options)
        for block in model.blocks:
            block.compile(backend=backend)
        return model

    assert_resumes(run_of)


def test_an_optimizer_for_each_parameter_that_steps_in_the_backward():
    """No gradient is kept: torchtune and PyTorch's tutorial do this to save memory."""

    def hooked(model: nn.Module) -> dict[str, Optimizer]:
        optimizers = {name: AdamW([p], lr=1e-2) for name, p in model.named_parameters()}
        by_parameter = {p: optimizers[name] for name, p in model.named_parameters()}

        def step(p: Tensor) -> None:
            by_parameter[p].step()
            by_parameter[p].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
        return optimizers

    def run(model: nn.Module, steps: range) -> list[float]:
        losses = []
        for step in steps:
            loss = model(*batch(step))
            loss.backward()
            losses.append(loss.item())
        return losses

    model = fresh(0)
    compiled = torch.compile(model, **LINE)
    optimizers = hooked(model)
    run(compiled, range(3))
    states = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
    saved = through_a_file({"model": model.state_dict(), "optimizers": states})
    expected = run(compiled, range(3, 6))
    assert all(p.grad is None for p in model.parameters())

    resumed = loaded(saved["model"])
    for name, optimizer in hooked(resumed).items():
        optimizer.load_state_dict(saved["optimizers"][name])
    assert run(torch.compile(resumed, backend="memcompile"), range(3, 6)) == expected
    assert_same(resumed.state_dict(), model.state_dict())


def test_an_exponential_moving_average():
    """Made before the first step and updated after each, as timm does; the average is saved and evaluated."""

    def averaged(model: nn.Module) -> AveragedModel:
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def run(model: nn.Module, optimizer: Optimizer, average: AveragedModel, steps: range) -> list[float]:
        losses = train(torch.compile(model, **LINE), optimizer, steps, lambda: average.update_parameters(model))
        with torch.no_grad():
            return [*losses, average(*batch(99)).item()]

    model = fresh(0)
    torch.compile(model, **LINE)
    optimizer, average = AdamW(model.parameters(), lr=1e-2), averaged(model)
    run(model, optimizer, average, range(3))
    parts = {"model": model, "average": average, "optimizer": optimizer}
    saved = through_a_file({name: part.state_dict() for name, part in parts.items()})
    expected = run(model, optimizer, average, range(3, 6))

    resumed = fresh(1)
    memcompile.plan(resumed, memory=memcompile.config_from(saved["model"]))
    optimizer, average = AdamW(resumed.parameters(), lr=1e-2), averaged(resumed)
    for name, part in {"model": resumed, "average": average, "optimizer": optimizer}.items():
        part.load_state_dict(saved[name])
    assert run(resumed, optimizer, average, range(3, 6)) == expected
    assert_same(resumed.state_dict(), model.state_dict())


class WithLoss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.model(tokens).view(-1, VOCABULARY), targets.flatten())


def test_the_inner_model_is_saved_and_optimised():
    """The line is on a module that adds a loss; the program saves and optimises the model inside."""
    assert_resumes(lambda model, **options: torch.compile(WithLoss(model), **options))
