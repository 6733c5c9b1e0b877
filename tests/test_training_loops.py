"""Training loops run unmodified: schedulers, scaler, clipping, accumulation, resume, Hugging Face."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer
from torch.optim import lr_scheduler as schedulers

import memcompile
from tests.models import VOCABULARY, tiny_gpt
from tests.planned import MEMORY, assert_same, batch, planned_gpt, stop_before_inductor

PLAN = {"memory_layers": [1], **MEMORY}
VALUES_LR = 1e-3


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def loss_of(model: Callable[..., Tensor], seed: int = 0) -> Tensor:
    return model(*batch(seed))


@pytest.fixture
def captured(monkeypatch):
    return stop_before_inductor(monkeypatch, lambda graph_module, inputs: graph_module.forward)


# --- schedulers ---------------------------------------------------------------------------------------------------


def sequential(optimizer: Optimizer) -> schedulers.LRScheduler:
    parts = [schedulers.LinearLR(optimizer, 0.1, total_iters=2), schedulers.ExponentialLR(optimizer, 0.5)]
    return schedulers.SequentialLR(optimizer, parts, milestones=[2])


SCHEDULERS: dict[str, Callable[[Optimizer], schedulers.LRScheduler]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, [lambda step: 0.5**step] * len(o.param_groups)),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, [0.5, 0.25], total_steps=10),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, T_max=6),
    "SequentialLR": sequential,
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, min_lr=[1e-3, 1e-4]),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, [0.1, 0.1], [0.5, 0.25], step_size_up=2),
}


def two_groups(model: nn.Module) -> Optimizer:
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    return SGD([{"params": decay, "weight_decay": 0.0}, {"params": rest, "lr": 0.05}], lr=0.1, momentum=0.0)


@pytest.mark.parametrize("order", ["optimizer, scheduler, plan", "optimizer, plan, scheduler", "plan, optimizer"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules_are_those_of_the_dense_model(name, order):
    dense_optimizer = two_groups(tiny_gpt(layers=2))
    dense_scheduler = SCHEDULERS[name](dense_optimizer)

    model = tiny_gpt(layers=2).double()
    if order == "plan, optimizer":
        memcompile.plan(model, **PLAN)
    optimizer = two_groups(model)
    scheduler = SCHEDULERS[name](optimizer) if order == "optimizer, scheduler, plan" else None
    memcompile.plan(model, **PLAN)  # the second time, it changes nothing
    scheduler = scheduler or SCHEDULERS[name](optimizer)

    seen = set()
    for _ in range(5):
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == [group["lr"] for group in dense_optimizer.param_groups]
        assert rates[0] != VALUES_LR
        model.zero_grad()
        loss_of(model).backward()
        for group in optimizer.param_groups:  # OneCycleLR and CyclicLR cycle the momentum too
            group["momentum"] = 0.0
        before = snapshot(model)
        optimizer.step()
        dense_optimizer.step()
        for parameter, rate in (("memory_values", VALUES_LR), ("head.weight", rates[0]), ("norm.bias", rates[1])):
            gradient = model.get_parameter(parameter).grad
            moved = before[parameter] - model.get_parameter(parameter).detach()
            assert gradient.any()
            torch.testing.assert_close(moved, rate * gradient, rtol=0, atol=1e-14)
        arguments = (1.0,) if name == "ReduceLROnPlateau" else ()
        scheduler.step(*arguments)
        dense_scheduler.step(*arguments)
        seen.add(tuple(rates))
    assert len(seen) > 2, "the schedule did nothing"


def test_a_scheduler_after_a_step_that_raised():
    model = planned_gpt()
    optimizer = two_groups(model)
    scheduler = SCHEDULERS["LambdaLR"](optimizer)

    def closure() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.025]


# --- loops --------------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": functools.partial(SGD, lr=0.1, momentum=0.9, nesterov=True),
    "AdamW": functools.partial(AdamW, lr=1e-2),
    "AdamW foreach": functools.partial(AdamW, lr=1e-2, foreach=True),
    "AdamW fused": functools.partial(AdamW, lr=1e-2, fused=True),
    "Adagrad": functools.partial(Adagrad, lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_order_of_optimizer_and_plan_does_not_matter(name):
    """Step for step the same training, whether the optimizer adopts the memory or is built with it."""
    results = []
    for optimizer_first in (True, False):
        torch.manual_seed(0)
        model = tiny_gpt(layers=2)
        optimizer = OPTIMIZERS[name](model.parameters()) if optimizer_first else None
        memcompile.plan(model, **PLAN)
        optimizer = optimizer or OPTIMIZERS[name](model.parameters())
        losses = []
        for step in range(4):
            optimizer.zero_grad(set_to_none=bool(step % 2))
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        results.append((losses, snapshot(model)))
    (first_losses, first), (second_losses, second) = results
    assert first_losses == second_losses
    assert first_losses[-1] < first_losses[0]
    assert_same(first, second)


def test_lbfgs_with_a_closure():
    torch.manual_seed(0)
    model = tiny_gpt(layers=2)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3, line_search_fn="strong_wolfe")
    memcompile.plan(model, **PLAN)
    before = model.memory_values.detach().clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1
    assert not torch.equal(model.memory_values, before)


def test_grad_scaler_and_clipping_before_the_first_step():
    """`unscale_` and clipping run before any step, so the groups must hold the memory by then."""
    torch.manual_seed(0)
    model = tiny_gpt(layers=2).double()
    optimizer = SGD(model.parameters(), lr=0.5)
    memcompile.plan(model, **PLAN)
    loss_of(model).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in expected.values()]))
    optimizer.zero_grad()

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = snapshot(model)
    scaler.scale(loss_of(model)).backward()
    scaler.unscale_(optimizer)
    clipped = nn.utils.clip_grad_norm_(model.parameters(), 0.5 * norm.item())
    torch.testing.assert_close(clipped, norm, rtol=1e-12, atol=0)
    scaler.step(optimizer)
    scaler.update()
    for name, rate in (("memory_values", VALUES_LR), ("head.weight", 0.5)):
        moved = before[name] - model.get_parameter(name).detach()
        clipped_gradient = expected[name] * 0.5 * norm / (norm + 1e-6)  # the epsilon of clip_grad_norm_
        torch.testing.assert_close(moved, rate * clipped_gradient, rtol=0, atol=1e-14)


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_skips_a_step_with_infinities(fused):
    model = planned_gpt()
    optimizer = AdamW(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def step(factor: float) -> dict[str, Tensor]:
        optimizer.zero_grad()
        scaler.scale(factor * loss_of(model)).backward()
        scaler.step(optimizer)
        scaler.update()
        return snapshot(model)

    start = snapshot(model)
    assert_same(step(math.inf), start)
    assert scaler.get_scale() == 4.0
    after = step(1.0)
    assert all(not torch.equal(after[name], start[name]) for name in start)
    assert scaler.get_scale() == 4.0
    touched = model.memory_values.grad != 0
    moved = (start["memory_values"] - after["memory_values"])[touched].abs()
    assert (moved < 1.2 * VALUES_LR).all()
    assert (moved.median() / VALUES_LR - 1).abs() < 0.1


def test_accumulated_gradients_are_those_of_the_joint_batch():
    model = planned_gpt().double()
    tokens, targets = batch(size=4)
    model(tokens, targets).backward()
    joint = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        (model(tokens[half], targets[half]) / 2).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, joint[name], rtol=1e-10, atol=1e-13)


def test_values_of_two_models_in_one_optimizer():
    models = [planned_gpt(values_lr=1e-3).double(), planned_gpt(values_lr=1e-2).double()]
    optimizer = SGD([p for model in models for p in model.parameters()], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        sum(map(loss_of, models)).backward()
        before = [model.memory_values.detach().clone() for model in models]
        optimizer.step()
        for model, old, rate in zip(models, before, (1e-3, 1e-2), strict=True):
            gradient = model.memory_values.grad
            torch.testing.assert_close(old - model.memory_values.detach(), rate * gradient, rtol=0, atol=1e-15)


# --- resume -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_resuming_continues_bit_for_bit(how):
    """Model, optimizer, scheduler and random numbers (dropout) from a file, by `weights_only=True`."""

    def fresh() -> tuple[nn.Module, Callable, Optimizer, schedulers.LRScheduler]:
        torch.manual_seed(0)
        model = tiny_gpt(layers=2, dropout=0.1)
        optimizer = AdamW(model.parameters(), lr=1e-2)
        run = model
        if how == "compiled":
            run = torch.compile(model, backend="memcompile", **PLAN)
        else:
            memcompile.plan(model, **PLAN)
        return model, run, optimizer, schedulers.OneCycleLR(optimizer, 1e-2, total_steps=10)

    def train(parts: tuple, steps: range) -> list[float]:
        _, run, optimizer, scheduler = parts
        losses = []
        for step in steps:
            optimizer.zero_grad()
            loss = loss_of(run, seed=step)
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        return losses

    parts = fresh()
    train(parts, range(3))
    model, _, optimizer, scheduler = parts
    file = io.BytesIO()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "random": torch.get_rng_state(),
    }
    torch.save(state, file)
    expected = train(parts, range(3, 6))

    resumed = fresh()
    file.seek(0)
    state = torch.load(file, weights_only=True)
    for part, name in ((resumed[0], "model"), (resumed[2], "optimizer"), (resumed[3], "scheduler")):
        part.load_state_dict(state[name])
    torch.set_rng_state(state["random"])
    assert train(resumed, range(3, 6)) == expected
    assert_same(snapshot(resumed[0]), snapshot(model))


# --- Hugging Face -------------------------------------------------------------------------------------------------


def tiny_llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def test_llama_compiled_in_place_trains_and_is_saved(tmp_path, captured):
    from safetensors.torch import load_file

    model, (tokens, _) = tiny_llama(), batch()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    model.compile(backend="memcompile", memory_layers=1, **MEMORY)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert captured

    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert_same(state, dict(model.state_dict()))
    config = memcompile.config_from(state)
    assert config.memory_layers == ("layers.1.mlp.down_proj.weight",)

    other = tiny_llama()
    memcompile.plan(other, memory=config)
    other.load_state_dict(state, strict=True)
    assert torch.equal(other.eval()(tokens).logits, model.eval()(tokens).logits)


def test_hugging_face_trainer(tmp_path, captured):
    pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")
    from transformers import Trainer, TrainingArguments

    model, (tokens, _) = tiny_llama(), batch(size=8)
    model.compile(backend="memcompile", memory_layers=1, **MEMORY)
    start = snapshot(model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    after = snapshot(model)
    assert captured
    assert all(not torch.equal(after[name], start[name]) for name in start)
    moved = (after["model.memory_values"] - start["model.memory_values"]).abs().max()
    assert 0 < moved < 5 * VALUES_LR  # at most about one rate a step of AdamW; the rest moves by ten times that

    resumed = tiny_llama()
    resumed.compile(backend="memcompile", memory_layers=1, **MEMORY)
    again = Trainer(model=resumed, args=arguments, train_dataset=data)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(snapshot(resumed), after)
