"""A planned model means the same everywhere: compiled, eager, in pieces, checkpointed, exported, cast, moved."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

import memcompile
from memcompile import CaptureError
from tests.models import (
    DYNAMO_TRACES_MATMUL_OF_OBJECTS,
    HIDDEN,
    VOCABULARY,
    WIDTH,
    ZOO,
    Block,
    Transformer,
    around,
    plain_ffn,
)
from tests.planned import (
    MEMORY,
    assert_same,
    batch,
    gradients,
    lookups,
    planned_gpt,
    stop_before_inductor,
)
from tests.tolerance import assert_as_accurate


@pytest.fixture
def captured(monkeypatch):
    """Captured graphs; they run as they are."""
    return stop_before_inductor(monkeypatch, lambda graph_module, inputs: graph_module.forward)


@pytest.fixture
def decomposed(monkeypatch):
    """Captured graphs; AOTAutograd takes them apart, as it does for Inductor, and eager kernels run them."""
    return stop_before_inductor(monkeypatch, aot_eager)


def outputs_and_gradients(model: nn.Module, *inputs: Tensor, call: Callable | None = None, seed: int = 1) -> dict:
    """One forward and backward of `call` (the model itself by default)."""
    model.zero_grad()
    torch.manual_seed(seed)
    output = (model if call is None else call)(*inputs)
    output.square().mean().backward()
    return {"output": output.detach(), **gradients(model)}


# --- compiled is eager ------------------------------------------------------------------------------------------


GRAPH_BREAKS = set() if DYNAMO_TRACES_MATMUL_OF_OBJECTS else {"raw_parameters"}


@pytest.mark.parametrize("name", ZOO)
def test_every_spelling_of_an_ffn_is_the_same_compiled_and_eager(name, decomposed):
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    model.blocks = model.blocks[:2]
    whole = name not in GRAPH_BREAKS
    compiled = torch.compile(model, backend="memcompile", fullgraph=whole, memory_layers=1, **MEMORY)

    eager = outputs_and_gradients(model, *inputs)
    assert_same(outputs_and_gradients(model, *inputs, call=compiled), eager)

    assert (len(decomposed) == 1) == whole
    assert sum(lookups(graph_module.graph) for graph_module in decomposed) == (2 if name == "shared" else 1)
    assert all(gradient.any() for gradient in eager.values()), "a parameter without effect"


@pytest.mark.parametrize("name", ["gpt", "fused_gate"])
def test_inductor_is_as_accurate_as_eager(name):
    """The rule of `tests.tolerance`, of the errors of eight batches: rounding errors of one are a matter of luck."""
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    model.blocks = model.blocks[:2]
    compiled = torch.compile(model, backend="memcompile", memory_layers=1, **MEMORY)
    batches = [tuple(torch.randint_like(tokens, VOCABULARY) for tokens in inputs) for _ in range(8)]
    fast = [outputs_and_gradients(model, *batch, call=compiled) for batch in batches]
    plain = [outputs_and_gradients(model, *batch) for batch in batches]
    exact = [outputs_and_gradients(model.double(), *batch) for batch in batches]
    for key in exact[0]:
        assert_as_accurate(*(torch.stack([found[key] for found in way]) for way in (fast, plain, exact)), key)


# --- in pieces --------------------------------------------------------------------------------------------------


class BrokenFfn(nn.Module):
    """A graph break between the activation and the down-projection."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(x))
        torch._dynamo.graph_break()
        return self.down(h)


class BrokenTransformer(Transformer):
    """A graph break after every block, so that Dynamo may run all blocks through one graph."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
            torch._dynamo.graph_break()
        return self.head(self.norm(x))


def broken_transformer(layers: int = 4) -> Transformer:
    return BrokenTransformer([Block(WIDTH, plain_ffn(WIDTH, HIDDEN)) for _ in range(layers)])


def test_a_graph_break_inside_the_ffn(captured):
    torch.manual_seed(0)
    model, (tokens, _) = around(BrokenFfn, layers=2), batch()
    compiled = torch.compile(model, backend="memcompile", memory_layers=[1], **MEMORY)
    eager = outputs_and_gradients(model, tokens)
    assert_same(outputs_and_gradients(model, tokens, call=compiled), eager)
    assert len(captured) > 1, "the break did not break"
    assert any(lookups(graph_module.graph) for graph_module in captured)


@pytest.mark.parametrize("chosen", [[0], [1, 3]])
def test_graph_breaks_between_blocks_that_are_alike(chosen, captured):
    torch.manual_seed(0)
    model, (tokens, _) = broken_transformer(), batch()
    compiled = torch.compile(model, backend="memcompile", memory_layers=chosen, **MEMORY)
    eager = outputs_and_gradients(model, tokens)
    assert_same(outputs_and_gradients(model, tokens, call=compiled), eager)
    assert sum(lookups(graph_module.graph) for graph_module in captured) == 1, "blocks of one kind share a graph"


def test_one_graph_per_block(captured):
    model, (tokens, _) = planned_gpt(layers=4, memory_layers=[1, 2]), batch()
    eager = outputs_and_gradients(model, tokens)
    for block in model.blocks:
        block.compile(backend="memcompile", fullgraph=True)
    assert_same(outputs_and_gradients(model, tokens), eager)
    assert {lookups(graph_module.graph) for graph_module in captured} == {0, 1}


def test_past_the_recompile_limit(captured):
    torch.manual_seed(0)
    model, (tokens, _) = broken_transformer(), batch()
    compiled = torch.compile(model, backend="memcompile", memory_layers=[1, 3], **MEMORY)
    eager = outputs_and_gradients(model, tokens)
    assert_same(outputs_and_gradients(model, tokens, call=compiled), eager)
    without_limit = len(captured)

    torch._dynamo.reset()
    captured.clear()
    with torch._dynamo.config.patch(recompile_limit=1):
        assert_same(outputs_and_gradients(model, tokens, call=compiled), eager)
    assert len(captured) < without_limit, "the limit was not reached"


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant, decomposed):
    class Checkpointed(Block):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=use_reentrant)

    torch.manual_seed(0)
    plain, (tokens, _) = Transformer([Block(WIDTH, plain_ffn(WIDTH, HIDDEN, 0.1), 0.1) for _ in range(2)]), batch()
    memcompile.plan(plain, memory_layers=1, **MEMORY)
    expected = outputs_and_gradients(plain, tokens)
    for block in plain.blocks:
        block.__class__ = Checkpointed
    assert_same(outputs_and_gradients(plain, tokens), expected)

    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    eager = outputs_and_gradients(plain, tokens)
    compiled = torch.compile(plain, backend="memcompile", fullgraph=True)
    assert_same(outputs_and_gradients(plain, tokens, call=compiled), eager)
    assert decomposed


# --- other ways to run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False])
def test_export_holds_the_lookup_and_survives_a_file(strict):
    model, (tokens, _) = planned_gpt(layers=2, memory_layers=2).eval(), batch()
    batch_dimension = torch.export.Dim("batch")
    program = torch.export.export(model, (tokens,), strict=strict, dynamic_shapes=({0: batch_dimension},))
    assert lookups(program.graph) == 2

    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    for tokens, _ in (batch(), batch(seed=1, size=7)):
        assert torch.equal(loaded.module()(tokens), model(tokens))


def test_gradient_modes_and_train_and_eval(captured):
    model, (tokens, _) = planned_gpt(dropout=0.5), batch()
    compiled = torch.compile(model, backend="memcompile")
    assert compiled.eval() is compiled
    assert not model.training
    expected = model(tokens).detach()
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        for call in (model, compiled):
            with mode():
                assert torch.equal(call(tokens), expected), (mode, call)
    compiled.train()
    assert model.blocks[1].ffn[2].memory.training
    assert not torch.equal(compiled(tokens), expected), "dropout is off in train mode"
    assert not torch.equal(model(tokens), expected)


def test_casting_after_compile(captured):
    model, (tokens, _) = planned_gpt(), batch()
    compiled = torch.compile(model, backend="memcompile")
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        compiled.to(dtype)
        assert model.memory_values.dtype == dtype
        eager = outputs_and_gradients(model, tokens)
        assert eager["output"].dtype == dtype
        assert_same(outputs_and_gradients(model, tokens, call=compiled), eager)
    assert captured


def test_moving_after_compile(captured):
    model, (tokens, _) = planned_gpt(), batch()
    compiled = torch.compile(model, backend="memcompile")
    expected = outputs_and_gradients(model, tokens, call=compiled)
    state = {name: value.clone() for name, value in model.state_dict().items()}

    compiled.to("meta")
    assert compiled(tokens.to("meta")).shape == expected["output"].shape
    compiled.to_empty(device="cpu")
    model.load_state_dict(state)
    for call in (model, compiled):
        assert_same(outputs_and_gradients(model, tokens, call=call), expected)


def test_autocast(captured):
    model, (tokens, _) = planned_gpt(), batch()
    compiled = torch.compile(model, backend="memcompile")
    with torch.autocast("cpu", torch.bfloat16):
        eager = outputs_and_gradients(model, tokens)
        assert eager["output"].dtype == torch.bfloat16
        assert_same(outputs_and_gradients(model, tokens, call=compiled), eager)


def test_functional_call_swaps_the_values():
    model, other, (tokens, _) = planned_gpt(seed=0), planned_gpt(seed=1), batch()
    parameters = dict(other.named_parameters())
    assert torch.equal(torch.func.functional_call(model, parameters, (tokens,)), other(tokens))


# --- what the owner does around its FFN ---------------------------------------------------------------------------


class ResidualFfn(nn.Module):
    """Norm, residual and dropout inside the FFN's own module."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(0.5)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + 2 * self.dropout(self.down(F.relu(self.up(self.norm(x)))))


class ResidualInsideBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(x + self.attention(self.norm1(x)))


def test_residual_norm_and_dropout_inside_the_module_stay():
    torch.manual_seed(0)
    model = Transformer([ResidualInsideBlock(WIDTH, ResidualFfn(WIDTH, HIDDEN)) for _ in range(2)])
    memcompile.plan(model, memory_layers=[1], **MEMORY)
    ffn, x = model.blocks[1].ffn, torch.randn(3, 5, WIDTH)
    torch.manual_seed(1)
    actual = ffn(x)
    torch.manual_seed(1)
    assert torch.equal(actual, x + 2 * F.dropout(ffn.down.memory(ffn.norm(x)), 0.5))


def test_forward_hooks_on_the_owner_see_and_change_tensors(captured):
    model, (tokens, _) = planned_gpt(memory_layers=[1]), batch()
    owner, seen = model.blocks[1].ffn, []
    plain = model(tokens)

    def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        seen.append((inputs[0].shape, output.shape))
        return 2 * output

    handle = owner.register_forward_hook(hook)
    compiled = torch.compile(model, backend="memcompile")
    eager = model(tokens)
    assert not torch.equal(eager, plain)
    assert torch.equal(compiled(tokens), eager)
    assert seen[0] == ((3, 5, WIDTH), (3, 5, WIDTH))
    handle.remove()
    assert torch.equal(compiled(tokens), plain)
    assert torch.equal(model(tokens), plain)


class OperatedFfn(nn.Module):
    """Runs `operator`, set after planning, on its hidden activation."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.operator: Callable[[Tensor], Tensor] = lambda h: h

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.operator(F.gelu(self.up(x))))


def test_misuse_of_the_hidden_activation_names_the_block(captured):
    torch.manual_seed(0)
    model, (tokens, _) = around(OperatedFfn, layers=2), batch()
    compiled = torch.compile(model, backend="memcompile", memory_layers=[1], **MEMORY)
    model.blocks[1].ffn.operator = lambda h: h + h.roll(1, dims=1)
    for call in (model, compiled):
        with pytest.raises(CaptureError, match=r"roll.*blocks\.1\.ffn"):
            call(tokens)
    model.blocks[1].ffn.operator = lambda h: h.contiguous()
    assert torch.equal(compiled(tokens), model(tokens))


# --- torch's own Transformer and its fused path -------------------------------------------------------------------


def close(actual: Tensor, expected: Tensor, keep: Tensor | slice = slice(None)) -> bool:
    """Up to the rounding between two orders of the same float32 sums (attention's fused path is another kernel)."""
    return torch.allclose(actual[keep], expected[keep], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder_layer_in_eval(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, HIDDEN, dropout=0.0, batch_first=True, norm_first=norm_first)
    x = torch.randn(3, 5, WIDTH)
    dense = layer(x)
    memcompile.plan(layer, memory_layers=1, **MEMORY)
    trained = layer(x)
    assert not torch.allclose(trained, dense, atol=0.1)
    layer.eval()
    with torch.no_grad():
        assert close(layer(x), trained)
    with torch.inference_mode():
        assert close(layer(x), trained)


@pytest.mark.parametrize("chosen", [[0], [1], [0, 1]])
def test_transformer_encoder_in_eval_with_padding(chosen):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, HIDDEN, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, num_layers=2)
    memcompile.plan(model, memory_layers=chosen, **MEMORY)
    x, padding = torch.randn(3, 5, WIDTH), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = padding[2, 1:] = True
    expected = model(x, src_key_padding_mask=padding)
    model.eval()
    with torch.no_grad():
        assert close(model(x, src_key_padding_mask=padding), expected, ~padding)
        assert close(model(x), model.train()(x))
