"""Rehearsal: what the detector proves and a stand-in cannot run is refused before anything of the model changes."""

import pytest
import torch
from torch import nn

import memcompile
from memcompile.common.pipeline import Pipeline
from memcompile.config import MemoryConfig
from memcompile.errors import PlanError
from memcompile.passes.detect.detect import find_in_model
from memcompile.planning.rehearsal import rehearse
from memcompile.runtime.install import rehearsed_stand_ins
from memcompile.runtime.stand_ins.operations import Operations
from tests.models import WIDTH, ZOO, Block, Transformer, around, plain_ffn
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


def rehearsed(model: nn.Module, placement: str = "replace", example_inputs=None) -> dict[str, str]:
    captures, blocks = find_in_model(Pipeline("find"), model, example_inputs)
    sites = [block.site for block in blocks if block.site.refusal is None]
    assert sites
    return rehearse(model, captures, sites, MemoryConfig(placement=placement)).refusals


@pytest.mark.parametrize("placement", ["replace", "add"])
@pytest.mark.parametrize("name", ZOO)
def test_every_spelling_of_the_zoo_passes(name, placement):
    model, inputs = ZOO[name]()
    assert rehearsed(model, placement, inputs) == {}


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


@pytest.mark.parametrize("placement", ["replace", "add"])
def test_stand_ins_of_a_rehearsal_leave_no_trace(placement):
    model, inputs = ZOO["inner_norm"]()
    sites = memcompile.find_ffns(model, inputs)
    state = [(type(m), list(m.__dict__), list(m._parameters.items())) for m in model.modules()]
    operations, config = {site.down: Operations() for site in sites}, MemoryConfig(placement=placement)
    with pytest.raises(ZeroDivisionError), rehearsed_stand_ins(model, sites, config, operations):
        1 / 0  # noqa: B018
    assert [(type(m), list(m.__dict__), list(m._parameters.items())) for m in model.modules()] == state


def test_a_layer_of_a_rehearsal_has_all_options_of_the_layer_but_its_sizes():
    model, inputs = ZOO["inner_norm"]()
    sites = memcompile.find_ffns(model, inputs)
    config = MemoryConfig(
        placement="add", variant="peer", gate=True, query_norm="none", qk_norm=True, weighting="sigmoid",
        tables="separate", n_keys=64, values_lr=None, values_grad="sparse",
    )  # fmt: skip
    with rehearsed_stand_ins(model, sites, config, {site.down: Operations() for site in sites}) as layers:
        rehearsed = [layer._config for layer in layers]
    sizes = {"memory_layers", "n_keys", "heads", "top_k", "key_dim", "value_dim"}
    assert {n for small in rehearsed for n, v in small.as_options().items() if v != getattr(config, n)} == sizes


class InOneMode(nn.Module):
    """An FFN that does something else in one of the modes."""

    def __init__(self, other, mode):
        super().__init__()
        self.up, self.down, self.other, self.mode = nn.Linear(WIDTH, 80), nn.Linear(80, WIDTH), other, mode

    def forward(self, x):
        hidden = self.up(x).relu()
        return self.down(self.other(hidden) if self.training is self.mode else hidden)


def mixes_tokens(hidden):
    return hidden - hidden.mean(1, keepdim=True)


def scales(hidden):
    return hidden * 0.5


def fails(hidden):
    raise RuntimeError("has no forward in this mode")


@pytest.mark.parametrize("planned_in", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("other", [mixes_tokens, scales, fails])
def test_the_other_mode_is_rehearsed_too(planned_in, other):
    model = around(plain_ffn, layers=3).train(planned_in)
    model.blocks[1].ffn = InOneMode(other, not planned_in).train(planned_in)
    rows = memcompile.plan(model, memory_layers="all", **MEMORY).rows
    assert [row.chosen for row in rows] == [True, other is not mixes_tokens, True]
    if other is mixes_tokens:
        mode = "eval" if planned_in else "train"
        assert rows[1].reason.startswith(f"in {mode} mode ") and "mean over tokens" in rows[1].reason
    for training in (planned_in, not planned_in) if other is not fails else (planned_in,):
        model.train(training)(torch.randint(50, (2, 5)))


# --- dtypes ----------------------------------------------------------------------------------------------------------


class MixedFfn(nn.Module):
    """As T5 in half precision: the down-projection has a dtype of its own, to which its input is cast, or from which
    the code casts it at use.
    """

    def __init__(self, up, down, cast="input", back=True):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 80, dtype=up), nn.Linear(80, WIDTH, dtype=down)
        self.cast, self.back = cast, back

    def forward(self, x):
        hidden = self.up(x.to(self.up.weight.dtype)).relu()
        if self.cast == "weight":
            weight, bias = self.down.weight.to(hidden.dtype), self.down.bias.to(hidden.dtype)
            return nn.functional.linear(hidden, weight, bias).to(x.dtype)
        if self.cast == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return self.down(hidden).to(x.dtype if self.back else torch.float32)
        hidden = hidden.to(self.down.weight.dtype)
        return self.down(hidden).to(x.dtype) if self.back else self.down(hidden)


BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize("placement", ["replace", "add"])
@pytest.mark.parametrize(
    ("stream", "up", "down", "cast", "back"),
    [
        (BF16, BF16, FP32, "input", True),
        (BF16, BF16, FP64, "input", True),
        (FP32, FP32, BF16, "input", True),
        (BF16, BF16, FP32, "weight", True),
        (BF16, FP32, FP32, "input", True),
        (FP32, FP32, FP32, "autocast", True),
        (FP32, FP32, FP32, "autocast", False),
    ],
)
def test_mixed_dtypes_run_as_the_dense_model_did(placement, stream, up, down, cast, back):
    model = around(lambda width, hidden: MixedFfn(up, down, cast, back), layers=2)
    for part in (model.tokens, model.positions, *(b.attention for b in model.blocks)):
        part.to(stream)
    for norm in (b.norm1 for b in model.blocks):
        norm.to(stream)
    if stream is not FP32:
        for block in model.blocks:
            block.norm2.to(stream)
        model.norm.to(stream), model.head.to(stream)
    tokens = torch.randint(50, (2, 5))
    dense = model(tokens).dtype
    memcompile.plan(model, memory_layers="all", placement=placement, example_inputs=(tokens,), **MEMORY)
    output = model(tokens)
    assert output.dtype == dense
    output.float().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "memory" in name)


class CheckingFfn(MixedFfn):
    def forward(self, x):
        hidden = self.up(x).relu().to(self.down.weight.dtype)
        if hidden.dtype != self.down.weight.dtype:
            raise TypeError("mixed dtypes")
        return self.down(hidden).to(x.dtype)


def test_code_that_checks_a_dtype_that_a_stand_in_has_not_is_refused():
    model = around(lambda width, hidden: CheckingFfn(FP32, BF16), layers=2)
    with pytest.raises(PlanError, match="TypeError: mixed dtypes"):
        memcompile.plan(model, memory_layers=1, **MEMORY)
    model(torch.randint(50, (2, 5))).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_t5_keeps_its_down_projection_in_float32(dtype):
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 80, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).to(dtype)
    for name, module in model.named_modules():
        if name.endswith(".wo"):
            module.float()
    tokens = {"input_ids": torch.randint(50, (2, 7)), "decoder_input_ids": torch.randint(50, (2, 5))}
    dense = model.train()(**tokens).logits
    memcompile.plan(model, memory_layers="all", **MEMORY)
    logits = model(**tokens).logits
    assert (logits.dtype, logits.shape) == (dense.dtype, dense.shape)
    logits.float().sum().backward()


# --- gradients -------------------------------------------------------------------------------------------------------


class Branches(Transformer):
    """The second block runs in another way than the rest."""

    def __init__(self, how):
        super().__init__([Block(WIDTH, plain_ffn(WIDTH, 80)) for _ in range(3)])
        self.how = how

    def forward(self, tokens):
        x = self.tokens(tokens)
        for i, block in enumerate(self.blocks):
            x = self.how(block, x) if i == 1 else block(x)
        return self.head(self.norm(x))


def without_grad(block, x):
    with torch.no_grad():
        teacher = block(x)
    return x + 0.1 * teacher


def in_inference_mode(block, x):
    with torch.inference_mode():
        teacher = block(x)
    return x + teacher.clone()


def detached(block, x):
    return x + block(x).detach()


def both_ways(block, x):
    return block(without_grad(block, x))


def recomputed(block, x):
    return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=True)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (without_grad, "it runs under no_grad or in inference mode"),
        (in_inference_mode, "it runs under no_grad or in inference mode"),
        (detached, "no gradient reaches it"),
        (both_ways, ""),
        (recomputed, ""),
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_block_that_no_gradient_reaches_is_left_alone(how, reason, frozen):
    model = Branches(how).requires_grad_(not frozen)
    if frozen:
        model.tokens.requires_grad_(True)  # reentrant checkpointing differentiates where its input does
    rows = memcompile.plan(model, memory_layers="all", **MEMORY).rows
    assert [row.chosen for row in rows] == [True, not reason, True]
    assert rows[1].reason.startswith(reason) and bool(rows[1].reason) == bool(reason)
    model(torch.randint(50, (2, 5))).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "memory" in name)


def test_a_forward_that_differentiates_nothing_may_have_a_memory_for_inference():
    class Predicts(Transformer):
        def forward(self, tokens):
            return super().forward(tokens).argmax(-1)

    model = Predicts([Block(WIDTH, plain_ffn(WIDTH, 80)) for _ in range(2)])
    assert all(row.chosen for row in memcompile.plan(model, memory_layers="all", **MEMORY).rows)


# --- FFNs as wide as the model ---------------------------------------------------------------------------------------


def test_a_block_as_wide_as_the_model_is_taken_by_its_name_alone():
    def model():
        return around(plain_ffn, hidden=WIDTH)

    with pytest.raises(PlanError, match="memory_layers takes it by its name"):
        memcompile.plan(model(), memory_layers=1, **MEMORY)
    named = model()
    for _ in range(2):  # a second plan is the same
        rows = memcompile.plan(named, memory_layers=["blocks.1.ffn"], **MEMORY).rows
    assert [row.chosen for row in rows] == [False, True, False, False]
    named(torch.randint(50, (2, 5))).sum().backward()
    assert all(p.grad is not None for name, p in named.named_parameters() if "memory" in name)
    again = model()
    memcompile.plan(again, memory=memcompile.config_from(named.state_dict()))
    again.load_state_dict(named.state_dict())


class Encoder(nn.Module):
    """PyTorch's example of a language model, with as many hidden features as features: time before batch."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, nhead=4, dim_feedforward=WIDTH)
        self.tokens, self.encoder = nn.Embedding(50, WIDTH), nn.TransformerEncoder(layer, num_layers=2)
        self.head, self.mask = nn.Linear(WIDTH, 50), None

    def forward(self, source):
        if self.mask is None or len(self.mask) != len(source):
            self.mask = torch.triu(torch.full((len(source), len(source)), float("-inf")), diagonal=1)
        return self.head(self.encoder(self.tokens(source) * WIDTH**0.5, mask=self.mask)).log_softmax(-1)


def test_the_language_model_of_the_pytorch_examples():
    model = Encoder()
    memcompile.plan(model, memory_layers=["encoder.layers.1"], **MEMORY)
    assert model.mask is None
    model(torch.randint(50, (7, 2))).sum().backward()
    assert model.encoder.layers[1].linear2.memory.query_weight.grad is not None


class Head(nn.Module):
    """A projector as wide as the model, behind it."""

    def __init__(self):
        super().__init__()
        self.body, self.projector = Encoder(), plain_ffn(50, 50)

    def forward(self, source):
        return self.projector(self.body(source))


def test_a_projector_is_not_taken_by_its_name():
    with pytest.raises(PlanError, match="'projector'"):
        memcompile.plan(Head(), memory_layers=["projector"], **MEMORY)
