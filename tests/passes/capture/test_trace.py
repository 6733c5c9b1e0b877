"""Tracing: what it sees, and that the model is as it was afterwards."""

import collections
import functools
import random

import pytest
import torch
from torch import nn

import memcompile
from memcompile.passes.capture.trace import trace
from memcompile.passes.fx import operator_name
from tests.models import BATCH, TIME, WIDTH, ZOO, Block, Transformer, plain_ffn, tiny_gpt
from tests.planned import MEMORY


def linears(graph):
    return [node for node in graph.nodes if operator_name(node) == "linear"]


class NeedsMask(nn.Module):
    """A model that no guess runs: ``mask`` must have the stream's own shape, and is no tensor by default."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(WIDTH, plain_ffn(WIDTH, 80)) for _ in range(2))

    def forward(self, x, mask):
        if not mask["keep"]:
            raise ValueError("nothing is kept")
        for block in self.blocks:
            x = block(x)
        return x


def test_the_whole_model_is_one_capture_and_names_every_parameter():
    model = tiny_gpt(layers=2)
    (capture,) = trace(model)
    assert capture.path == ""
    assert list(capture.parameters.values()) == [name for name, _ in model.named_parameters()]
    assert len(linears(capture.graph)) == 2 * 4 + 1  # qkv, out, up, down of each block, and the head


def test_example_inputs_give_the_shapes():
    model = tiny_gpt(layers=1)
    tokens = torch.randint(50, (BATCH, TIME))
    for given in ((tokens,), {"tokens": tokens}, [tokens], tokens, ((tokens,), {"targets": tokens})):
        (capture,) = trace(model, given)
        assert linears(capture.graph)[0].meta["val"].shape == (BATCH, TIME, 3 * WIDTH), given


def test_a_model_that_no_guess_runs_is_traced_in_parts():
    captures = trace(NeedsMask())
    assert [c.path for c in captures] == ["blocks.0", "blocks.1"]
    assert set(captures[1].parameters.values()) == {
        f"blocks.1.{n}" for n, _ in Block(WIDTH, plain_ffn(WIDTH, 80)).named_parameters()
    }


def test_parts_name_a_shared_parameter_alike():
    model = NeedsMask()
    model.blocks[1].ffn = model.blocks[0].ffn
    first, second = trace(model)
    assert "blocks.0.ffn.0.weight" in first.parameters.values()
    assert "blocks.0.ffn.0.weight" in second.parameters.values()


def test_example_inputs_that_do_not_run_are_reported(caplog):
    captures = trace(tiny_gpt(layers=1), {"tokens": torch.zeros(2, 3, 4, 5, dtype=torch.long)})
    assert "does not run on example_inputs" in caplog.text
    assert [c.path for c in captures] == [""]


def test_checkpointed_blocks_are_seen():
    class Checkpointed(Transformer):
        def forward(self, tokens):
            x = self.tokens(tokens)
            for block in self.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            return self.head(x)

    (capture,) = trace(Checkpointed([Block(WIDTH, plain_ffn(WIDTH, 80)) for _ in range(2)]))
    assert len(linears(capture.graph)) == 9


class Careless(nn.Module):
    """Leaves something behind in every way that a forward can."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, 80), nn.BatchNorm1d(80), nn.Dropout(0.5), nn.Linear(80, WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.calls, self.cache, self.seen, self.last = 0, {}, [], None
        self.scratch = torch.zeros(80)  # a tensor that is neither parameter nor buffer

    def forward(self, x):
        self.count += 1
        self.calls += 1
        self.cache[x.shape] = torch.ones(x.shape[0])
        self.seen.append(x)
        self.last = h = self.inner(x.flatten(0, -2))
        self.scratch.add_(1)
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.ones(3))
        random.random()
        torch.rand(1)
        return h.view_as(x)


def snapshot(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    identities = {name: id(value) for name, value in [*model.named_parameters(), *model.named_buffers()]}
    attributes = [{k: v for k, v in m.__dict__.items() if not k.startswith("_")} for m in model.modules()]
    attributes = [{k: v.copy() if isinstance(v, dict | list) else v for k, v in a.items()} for a in attributes]
    return state, identities, attributes, random.getstate(), torch.get_rng_state()


def assert_unchanged(before, model):
    state, identities, attributes, python_random, torch_random = snapshot(model)
    assert before[0].keys() == state.keys()
    assert all(torch.equal(before[0][name], value) for name, value in state.items())
    assert before[1] == identities
    assert before[2] == attributes
    assert before[3] == python_random
    assert torch.equal(before[4], torch_random)
    assert all(p.grad is None for p in model.parameters())
    assert not any(isinstance(v, torch._subclasses.FakeTensor) for m in model.modules() for v in m.__dict__.values())


def test_tracing_leaves_a_careless_model_as_it_was():
    model = Careless()
    before = snapshot(model)
    (capture,) = trace(model)
    assert linears(capture.graph)
    assert model.calls == 0 and not model.cache and not model.seen and model.last is None
    assert torch.equal(model.scratch, torch.zeros(80))
    assert_unchanged(before, model)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("training", [True, False])
def test_tracing_leaves_every_model_as_it_was(name, training):
    model, _ = ZOO[name]()
    model.train(training)
    before = snapshot(model)
    trace(model)
    assert_unchanged(before, model)


@pytest.mark.parametrize("bound", [None, 8])
def test_caches_of_functions_keep_no_fake_tensor(bound):
    @functools.lru_cache(bound)
    def frequencies(time):
        return {"angles": (torch.arange(time).float(),)}

    @functools.lru_cache(bound)
    def untouched():
        return object()

    class Rotary(Transformer):
        def forward(self, tokens):
            return super().forward(tokens) + frequencies(tokens.shape[1])["angles"][0][:, None]

    model, kept = Rotary([Block(WIDTH, plain_ffn(WIDTH, 80))]), untouched()
    tokens = torch.randint(50, (2, 7))
    before = model(tokens)
    frequencies.cache_clear()
    trace(model, (tokens,))
    assert torch.equal(model(tokens), before)
    assert untouched() is kept


def test_hooks_stay_silent():
    model, seen = tiny_gpt(layers=1), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: seen.append("after"))
        module.register_forward_pre_hook(lambda *_: seen.append("before"))
    trace(model)
    assert not seen
    model(torch.randint(50, (1, 2)))
    assert "before" in seen and "after" in seen


def test_a_failed_guess_leaves_nothing_for_the_next():
    """Token ids first, features second: the first fails after it has stored something."""

    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.body, self.memo = nn.Embedding(50, WIDTH), plain_ffn(WIDTH, 80), None

        def forward(self, x):
            self.memo = x if self.memo is None else self.memo
            return x + self.body(self.memo)

    model = Remembers()
    (capture,) = trace(model)
    assert capture.path == ""
    assert model.memo is None


def test_a_model_on_meta_stays_there():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # 32 layers, 6.7 billion parameters
    (capture,) = trace(model)
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}
    assert len(linears(capture.graph)) == 32 * 7 + 1
    assert all(node.meta["val"].device.type == "meta" for node in linears(capture.graph))


class LayerDrop(Transformer):
    """Leaves out blocks in train mode, as layer drop does for one batch."""

    def forward(self, tokens):
        x = self.tokens(tokens)
        for index, block in enumerate(self.blocks):
            if not (self.training and index % 2):
                x = block(x)
        return self.head(self.norm(x))


def test_what_train_mode_leaves_out_is_traced_in_eval_mode():
    model = LayerDrop([Block(WIDTH, plain_ffn(WIDTH, 80)) for _ in range(4)])
    modes = [module.training for module in model.modules()]
    whole, rest = trace(model)
    assert (whole.only, whole.forward.training, rest.forward.training) == (None, None, False)
    left_out = {name for name in model.state_dict() if name.startswith(("blocks.1.", "blocks.3."))}
    assert rest.only == left_out and left_out < whole.unread
    assert "positions.weight" in rest.unread and not rest.covers("positions.weight")
    assert [module.training for module in model.modules()] == modes
    assert len(trace(model.eval())) == 1


def test_blocks_left_out_are_found_in_order_and_run_once():
    model = LayerDrop([Block(WIDTH, plain_ffn(WIDTH, 80)) for _ in range(4)])
    explanation = memcompile.plan(model, memory_layers="all", **MEMORY)
    assert [(row.site.name, row.site.calls, row.chosen) for row in explanation.rows] == [
        (f"blocks.{i}.ffn", 1, True) for i in range(4)
    ]
    model.eval()(torch.randint(50, (BATCH, TIME))).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "memory" in name)


class Masked(Transformer):
    """A value decides how many tokens go on: no fake tensor knows it."""

    def forward(self, tokens):
        x = self.tokens(tokens)
        kept = x[(tokens >= 0).all(1)]
        for block in self.blocks:
            kept = block(kept) if (tokens >= 0).any() else kept
        return self.head(self.norm(kept))


def test_where_values_decide_a_copy_of_the_model_runs_once():
    model = Masked([Block(WIDTH, plain_ffn(WIDTH, 80)) for _ in range(2)])
    before = {name: (tensor.clone(), tensor._version) for name, tensor in model.state_dict().items()}
    tokens, random_state = torch.randint(50, (BATCH, TIME)), torch.get_rng_state()
    (capture,) = trace(model, (tokens,))
    assert (capture.path, capture.forward.compute) == ("", True)
    assert len(linears(capture.graph)) == 2 * 4 + 1
    assert all(torch.equal(tensor, before[name][0]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [c.path for c in trace(model.to("meta"))] != [""]  # no values, no whole


def test_a_hugging_face_model_that_has_run_collects_its_hidden_states():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80
    )

    class LastButOne(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = transformers.BertModel(config)

        def forward(self, tokens):
            return self.bert(tokens, output_hidden_states=True).hidden_states[-2]

    model, tokens = LastButOne(), torch.randint(50, (BATCH, TIME))
    model(tokens)
    assert [c.path for c in trace(model, (tokens,))] == [""]


class Merging(nn.Linear):
    """Changes its weight when its mode changes, as LoRA layers that merge do."""

    def train(self, mode=True):
        if hasattr(self, "weight") and self.training != mode:
            self.weight.data += 1
        return super().train(mode)


def test_eval_mode_is_not_entered_by_the_owners_own_method():
    model = LayerDrop([Block(WIDTH, plain_ffn(WIDTH, 80)) for _ in range(2)])
    model.blocks[0].ffn[0] = Merging(WIDTH, 80)
    weight = model.blocks[0].ffn[0].weight.clone()
    assert len(trace(model)) == 2
    assert torch.equal(model.blocks[0].ffn[0].weight, weight)


class Keeping(Transformer):
    """Keeps activations in containers of containers."""

    def __init__(self, blocks):
        super().__init__(blocks)
        self.kept = {"a": [], "b": collections.defaultdict(list), "c": collections.deque()}

    def forward(self, tokens):
        x = super().forward(tokens)
        self.kept["a"].append(x)
        self.kept["b"]["x"].append(x)
        self.kept["c"].append([x])
        return x


def test_nothing_is_kept_in_nested_containers():
    model = Keeping([Block(WIDTH, plain_ffn(WIDTH, 80))])
    trace(model)
    assert model.kept == {"a": [], "b": {}, "c": collections.deque()}
