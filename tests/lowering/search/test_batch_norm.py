"""BatchNorm of the query against `nn.BatchNorm1d`: outputs, gradients and running statistics, in training and in eval
mode, recomputed, compiled, and where a batch has no tokens or one.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

from memcompile.lowering import memory_lookup
from tests.lowering.cases import Case, Recorder, cases, leaves
from tests.lowering.reference import memory_lookup_reference
from tests.tolerance import assert_as_accurate

CASE = Case(dtype=torch.float64, leading=(3, 4))


def detached(case):
    return [None if t is None else t.detach() for t in case.tensors()]


@pytest.mark.parametrize("training", [True, False])
def test_it_is_nn_batch_norm(training):
    """Three steps, with a module of PyTorch between the projection and the search."""
    x, weight, bias, *rest = CASE.tensors()
    ours, drawn = CASE.batch_norm(), CASE.batch_norm()
    module = nn.BatchNorm1d(weight.shape[0], dtype=torch.float64).train(training)
    module.load_state_dict(
        dict(zip(["weight", "bias", "running_mean", "running_var"], drawn.values(), strict=True)), strict=False
    )
    twin = leaves([x, weight, bias, *rest])
    identity = torch.eye(weight.shape[0], dtype=torch.float64)
    for step in range(3):
        actual = memory_lookup((1 + step) * x, weight, bias, *rest, **ours, **CASE.options, training=training)
        tokens = (1 + step) * twin[0].flatten(0, 1)
        query = module(nn.functional.linear(tokens, *twin[1:3]))
        y = memory_lookup_reference(query, identity, None, *twin[3:5], **CASE.options)
        gate = nn.functional.silu(nn.functional.linear(tokens, *twin[5:7]))
        expected = nn.functional.linear(y * gate, *twin[7:9]).view_as(actual)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        actual.square().sum().backward()
        expected.square().sum().backward()
    for name, tensor in zip(["query_mean", "query_var"], [module.running_mean, module.running_var], strict=True):
        torch.testing.assert_close(ours[name], tensor, rtol=1e-12, atol=1e-12)
    actual = [t.grad for t in (x, weight, bias, *rest, ours["query_scale"], ours["query_shift"]) if t is not None]
    expected = [t.grad for t in (*twin, module.weight, module.bias) if t is not None]
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@settings(max_examples=50)
@given(cases(dtypes=(torch.float32, torch.bfloat16)))
def test_any_shape(case):
    for training in (False, True):
        if training and torch.Size(case.leading).numel() < 2:
            continue
        tensors, batch_norm = case.tensors(), case.batch_norm()
        running = batch_norm["query_mean"].clone()
        with Recorder() as seen:
            output = memory_lookup(*tensors, **batch_norm, **case.options, training=training)
        assert torch.equal(running, batch_norm["query_mean"]) is not training
        batch_norm["query_mean"] = running  # the reference takes them as they were
        plain, exact = (
            memory_lookup_reference(
                *leaves(tensors, dtype),
                **{name: tensor.detach().to(dtype) for name, tensor in batch_norm.items()},
                **case.options,
                slots=seen.slots,
                training=training,
            )
            for dtype in (case.dtype, torch.float64)
        )
        assert_as_accurate(output, plain, exact, f"output, training={training}")


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck_and_opcheck(training):
    case = replace(CASE, leading=(3,), width=2, half_dim=2, n_keys=3, top_k=2, value_dim=2, out_dim=None, gate=False)
    tensors, batch_norm = case.tensors(), case.batch_norm()
    running = {name: batch_norm.pop(name) for name in ("query_mean", "query_var")}
    there = [*tensors[:5], *batch_norm.values()]

    def run(*given_tensors):
        scale, shift = given_tensors[5:]
        clones = {name: tensor.clone() for name, tensor in running.items()}
        options = {"query_scale": scale, "query_shift": shift, **clones, **case.options, "training": training}
        return memory_lookup(*given_tensors[:5], **options)

    torch.autograd.gradcheck(run, there)
    torch.autograd.gradgradcheck(run, there, fast_mode=True)
    overload = torch.ops.memcompile.memory_lookup
    overload = overload.updating if training else overload.default
    torch.library.opcheck(overload, tuple(tensors), {**case.options, **batch_norm, **running, "training": training})


@pytest.mark.parametrize(
    ("reentrant", "compiled"),
    [(False, "nothing"), (False, "inside"), (False, "outside"), (True, "nothing"), (True, "inside")],
)
def test_a_recomputed_forward_moves_the_statistics_once(reentrant, compiled):
    def run(through, compiled):
        tensors, batch_norm = CASE.tensors(), CASE.batch_norm()

        def layer(x):
            return memory_lookup(x, *tensors[1:], **batch_norm, **CASE.options, training=True)

        inner = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled == "inside" else layer
        model = lambda x: through(inner, x).square().sum()  # noqa: E731
        model = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled == "outside" else model
        model(tensors[0]).backward()
        return batch_norm["query_mean"], batch_norm["query_var"], [t.grad for t in tensors if t is not None]

    actual = run(lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant), compiled)
    torch.testing.assert_close(actual, run(lambda layer, x: layer(x), "nothing"), rtol=1e-12, atol=1e-12)


def test_a_batch_without_tokens_changes_nothing():
    case = replace(CASE, leading=(0,))
    batch_norm, before = case.batch_norm(), case.batch_norm()
    memory_lookup(*case.tensors(), **batch_norm, **case.options, training=True).sum().backward()
    assert all(torch.equal(batch_norm[name], before[name]) for name in before)
    assert not batch_norm["query_scale"].grad.any()


def test_one_token_has_no_variance():
    case = replace(CASE, leading=(1,))
    arguments = {**case.batch_norm(leaves=False), **case.options}
    with pytest.raises(ValueError, match=r"more than one token in training, as nn\.BatchNorm1d"):
        memory_lookup(*detached(case), **arguments, training=True)
    assert memory_lookup(*detached(case), **arguments).isfinite().all()


def test_statistics_do_not_move_under_vmap():
    x, *rest = detached(CASE)
    arguments = {**CASE.batch_norm(leaves=False), **CASE.options}
    with pytest.raises(NotImplementedError, match="put the layer in eval mode"):
        vmap(lambda x: memory_lookup(x, *rest, **arguments, training=True))(x)
    actual = vmap(lambda x: memory_lookup(x, *rest, **arguments))(x)
    torch.testing.assert_close(actual, memory_lookup(x, *rest, **arguments))
