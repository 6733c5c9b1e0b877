"""plan(): what it changes in a model, when it changes nothing, and when it refuses."""

import gc
import signal
import weakref

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import nn

import memcompile
from memcompile import MemoryConfig, OptionError, PlanError
from memcompile.runtime.pool import pool_of
from tests.models import WIDTH, ZOO, tiny_gpt
from tests.planned import MEMORY

SIZES = {"n_keys": 8, "top_k": 4, "heads": 2}


def chosen(explanation):
    return [row.site.name for row in explanation.rows if row.chosen]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (1, [2]),
        (3, [0, 2, 3]),
        ([1, 2], [1, 2]),
        ([-1], [3]),
        ((-4, 3), [0, 3]),
        (["blocks.1.ffn"], [1]),
        (["blocks.1.ffn.2.weight", 0], [0, 1]),
        (lambda site: site.name != "blocks.2.ffn", [0, 1, 3]),
        ("all", [0, 1, 2, 3]),
        ("blocks.[1-2].*", [1, 2]),
        ("blocks.1.ffn", [1]),
        (["blocks.0.*", -1], [0, 3]),
    ],
)
def test_the_choice_of_layers(layers, expected):
    model = tiny_gpt()
    explanation = memcompile.plan(model, memory_layers=layers, **SIZES)
    assert chosen(explanation) == [f"blocks.{i}.ffn" for i in expected]
    for i, block in enumerate(model.blocks):
        assert hasattr(block.ffn[2], "memory") == (i in expected)
        assert isinstance(block.ffn[0].weight, nn.Parameter) == (i not in expected)


def test_the_parameters_exist_when_it_returns():
    model = tiny_gpt()
    memcompile.plan(model, memory_layers=2, **SIZES)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if "memory" in n}
    layer = {
        "query_weight": (2 * 16, WIDTH),
        "query_bias": (2 * 16,),
        "half_keys": (2, 2, 8, 8),
        "gate_weight": (WIDTH, WIDTH),
        "gate_bias": (WIDTH,),
        "out_weight": (WIDTH, WIDTH),
        "out_bias": (WIDTH,),
    }
    assert shapes == {"memory_values": (64, WIDTH)} | {
        f"blocks.{i}.ffn.2.memory.{name}": shape for i in (1, 3) for name, shape in layer.items()
    }
    assert set(shapes) <= set(model.state_dict())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ZOO)
def test_one_table_of_values_on_the_root(name):
    model, inputs = ZOO[name]()
    memcompile.plan(model, memory_layers=1 if name == "shared" else 3, **SIZES | {"n_keys": 16})
    values = [n for n, p in model.named_parameters() if p.shape == (256, WIDTH)]
    assert values == ["memory_values"]
    model(*inputs, torch.randint(50, inputs[0].shape)).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "memory" in n)


def test_the_rest_of_the_model_stays():
    model = tiny_gpt()
    before = dict(model.named_parameters())
    explanation = memcompile.plan(model, memory_layers=[1], **SIZES)
    replaced = set(explanation.rows[1].site.parameters)
    after = dict(model.named_parameters())
    assert before.keys() - after.keys() == replaced
    assert all(after[name] is p for name, p in before.items() if name not in replaced)


def test_the_replaced_weights_are_freed():
    model = tiny_gpt()
    names = [f"blocks.{i}.ffn.{j}.{leaf}" for i in (0, 2) for j in (0, 2) for leaf in ("weight", "bias")]
    removed = [weakref.ref(model.get_parameter(name)) for name in names]
    kept = weakref.ref(model.get_parameter("blocks.1.ffn.0.weight"))
    optimizer = torch.optim.Adam(model.parameters())
    memcompile.plan(model, memory_layers=[0, 2], **SIZES)
    gc.collect()
    assert [ref() for ref in removed] == [None] * len(names)
    assert kept() is not None
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}


def test_train_and_eval_flags_stay():
    model = tiny_gpt().eval()
    model.blocks[0].train()
    before = [m.training for m in model.modules()]
    memcompile.plan(model, memory_layers=[1], **SIZES)
    assert [m.training for m in model.modules() if type(m).__name__ != "MemoryLayer"] == before
    assert not model.blocks[1].ffn[2].memory.training


def test_planning_twice_changes_nothing():
    model = tiny_gpt()
    first = memcompile.plan(model, memory_layers=[0, 2], **SIZES)
    before = dict(model.named_parameters())
    again = [
        memcompile.plan(model),
        memcompile.plan(model, heads=2),
        memcompile.plan(model, memory_layers=[0, 2], **SIZES),
        memcompile.plan(model, memory_layers=(0, 2)),
        memcompile.plan(model, memory=MemoryConfig(memory_layers=[0, 2], **SIZES)),
        memcompile.plan(model.blocks[1]),
        memcompile.plan(model.blocks[0].ffn, top_k=4),
        memcompile.plan(torch.compile(model, backend="eager")),
    ]
    assert all(repr(explanation) == repr(first) for explanation in again)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(before[n] is after[n] for n in before)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"gate": True}, {"gate": None}),
        ({"variant": "memory"}, {"gate": False}),
        ({"gate": False}, {"variant": "memory"}),
        ({"variant": "memory"}, {"memory": MemoryConfig(memory_layers=2, gate=False, **SIZES)}),
        ({"gate": False}, {"memory": MemoryConfig(memory_layers=2, variant="memory", **SIZES)}),
        ({"variant": "pkm", "query_norm": "none"}, {"variant": "memory"}),
        ({"query_norm": "batch"}, {"variant": "pkm", "gate": True}),
        ({"variant": "peer", "gate": True}, {"gate": True}),
        ({"variant": "peer", "gate": True}, {"query_norm": "batch"}),
        ({"variant": "peer"}, {"variant": "peer", "query_norm": "batch", "gate": False}),
    ],
)
def test_planning_twice_in_other_words_changes_nothing(first, second):
    model = tiny_gpt()
    explained = memcompile.plan(model, memory_layers=2, **SIZES, **first)
    assert repr(memcompile.plan(model, **second)) == repr(explained)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"gate": True}, {"variant": "memory"}),
        ({"gate": False}, {"gate": None}),
        ({"gate": False}, {"memory": MemoryConfig(memory_layers=2, **SIZES)}),
        ({"variant": "memory", "gate": True}, {"memory": MemoryConfig(memory_layers=2, variant="memory", **SIZES)}),
        ({"query_norm": "batch"}, {"variant": "pkm", "query_norm": "batch", "gate": None}),
        ({"variant": "pkm", "query_norm": "none"}, {"variant": "pkm", "query_norm": None}),
        ({"variant": "peer"}, {"variant": "peer", "query_norm": "none"}),
        ({"variant": "peer"}, {"variant": "pkm"}),
    ],
)
def test_another_layer_in_the_same_words_is_an_error(first, second):
    """Also where each option by itself is that of the plan, given or resolved."""
    model = tiny_gpt()
    memcompile.plan(model, memory_layers=2, **SIZES, **first)
    with pytest.raises(PlanError, match=r"already has a memory planned with .*build the model anew"):
        memcompile.plan(model, **second)


@pytest.mark.parametrize(
    "options",
    [
        {"memory_layers": 1},
        {"heads": 4},
        {"gate": False},
        {"memory": MemoryConfig()},
        {"n_keys": None},
    ],
)
def test_planning_otherwise_is_an_error(options):
    model = tiny_gpt()
    memcompile.plan(model, memory_layers=2, **SIZES)
    for part in (model, model.blocks[0]):
        with pytest.raises(PlanError, match=r"already has a memory planned with .*build the model anew"):
            memcompile.plan(part, **options)


def test_planned_parts_and_then_the_whole():
    model = tiny_gpt()
    memcompile.plan(model.blocks[2], memory_layers=1, **SIZES)
    with pytest.raises(PlanError, match=r"parts of Transformer already have a memory \('blocks.2'\)"):
        memcompile.plan(model, memory_layers=1, **SIZES)
    memcompile.plan(model.blocks[3], memory_layers=1, **SIZES)
    with pytest.raises(PlanError, match=r"parts of Transformer already have a memory \('blocks.2', 'blocks.3'\)"):
        memcompile.plan(model, memory_layers=1, **SIZES)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"memory_layers": 5}, PlanError, "memory_layers=5, but only 4 feed-forward block"),
        ({"memory_layers": [4]}, PlanError, "names block 4, but there are 4"),
        ({"memory_layers": ["ffn"]}, PlanError, "names 'ffn', which is no feed-forward block"),
        ({"memory_layers": lambda site: False}, PlanError, "filter chose none"),
        ({"layers": 2}, OptionError, "unknown memcompile option 'layers'"),
        ({"heads": 0}, OptionError, "heads must be"),
        ({"memory": {"heads": 2}}, OptionError, "memory must be a memcompile.MemoryConfig, got {'heads': 2}"),
        ({"memory": MemoryConfig(), "heads": 2}, OptionError, r"memory=MemoryConfig\(...\) or the options \['heads'\]"),
        ({"memory": MemoryConfig(), "head": 2}, OptionError, "'head': did you mean 'heads'"),
    ],
)
def test_what_cannot_be_planned(options, error, message):
    model = tiny_gpt()
    before = dict(model.named_parameters())
    with pytest.raises(error, match=message):
        memcompile.plan(model, **options)
    assert dict(model.named_parameters()).keys() == before.keys()
    assert pool_of(model) is None


def test_names_that_the_model_uses_itself():
    model = tiny_gpt()
    model.memory_values = 3
    with pytest.raises(PlanError, match="already has an attribute 'memory_values': rename it"):
        memcompile.plan(model, memory_layers=1, **SIZES)
    del model.memory_values
    model.blocks[2].ffn[2].memory = 3
    with pytest.raises(PlanError, match=r"holds 'blocks.2.ffn.2.weight' already has an attribute 'memory': rename it"):
        memcompile.plan(model, memory_layers=1, **SIZES)
    assert pool_of(model) is None and not hasattr(model, "memory_values")


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def fully_shard(model, mesh):
    dist.fsdp.fully_shard(model, mesh=mesh)


def tensor_parallel(model, mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    projection = model.blocks[0].ffn[0]
    projection.weight = nn.Parameter(distribute_tensor(projection.weight.detach(), mesh, [Shard(0)]))


@pytest.mark.parametrize("shard", [fully_shard, tensor_parallel])
def test_a_sharded_model_is_an_error(shard, mesh):
    model = tiny_gpt()
    shard(model, mesh)
    with pytest.raises(PlanError, match=r"already sharded: plan before fully_shard\(\) and distribute_tensor\(\)"):
        memcompile.plan(model, memory_layers=1, **SIZES)


def test_a_planned_model_may_be_sharded_and_planned_again(mesh):
    model = tiny_gpt()
    memcompile.plan(model, memory_layers=1, **SIZES)
    fully_shard(model, mesh)
    assert chosen(memcompile.plan(model)) == ["blocks.2.ffn"]


def test_the_same_plan_in_other_words_is_no_other_plan():
    model = tiny_gpt()
    memcompile.plan(model, memory_layers=2, **SIZES)
    names = list(pool_of(model).layers)
    for same in (2, [1, 3], names, lambda site: site.down in names):
        memcompile.plan(model, memory_layers=same, **SIZES)
    resumed = tiny_gpt()
    memcompile.plan(resumed, memory=memcompile.config_from(model.state_dict()))
    memcompile.plan(resumed, memory_layers=2, **SIZES)
    for other in (1, [0, 3]):
        with pytest.raises(PlanError, match="already has a memory"):
            memcompile.plan(model, memory_layers=other, **SIZES)


@pytest.mark.parametrize(("words", "others"), [("all", "blocks.[12].*"), ("*.[13].*", "all")])
def test_words_are_resolved_to_names(words, others):
    model = tiny_gpt()
    memcompile.plan(model, memory_layers=words, **SIZES)
    config = memcompile.config_from(model.state_dict())
    assert config.memory_layers == tuple(pool_of(model).layers)
    resumed = tiny_gpt()
    memcompile.plan(resumed, memory=config)
    for planned in (model, resumed):
        memcompile.plan(planned, memory_layers=words, **SIZES)
        with pytest.raises(PlanError, match="already has a memory"):
            memcompile.plan(planned, memory_layers=others)


def test_another_placement_is_another_plan():
    model = tiny_gpt()
    memcompile.plan(model, memory_layers=1, placement="add", **SIZES)
    memcompile.plan(model, placement="add")
    with pytest.raises(
        PlanError, match=r"planned with \{'placement': 'add'\}, now asked for \{'placement': 'replace'\}"
    ):
        memcompile.plan(model, placement="replace")


def test_reset_parameters_after_meta():
    with torch.device("meta"):
        model = tiny_gpt()
    memcompile.plan(model, memory_layers=1, **SIZES)
    model.to_empty(device="cpu")
    torch.nn.init.constant_(model.memory_values, float("nan"))
    memcompile.reset_parameters(model)
    values = model.memory_values
    torch.testing.assert_close(values.std().item(), values.shape[1] ** -0.5, rtol=0.1, atol=0)
    with pytest.raises(PlanError, match="has no memory"):
        memcompile.reset_parameters(tiny_gpt())


def test_values_lr_of_any_real_type_travels():
    config = MemoryConfig(values_lr=numpy.float32(0.5))
    assert MemoryConfig.from_dict(config.to_dict()) == config
    assert type(config.values_lr) is float


def test_an_interrupt_waits_until_the_model_is_whole(monkeypatch):
    """Ctrl-C between the layers and the optimizer: the plan is finished first, then the interrupt is raised."""
    model = tiny_gpt(layers=2)
    optimizer = torch.optim.AdamW(model.parameters())
    adopt = memcompile.planning.plan.adopt_optimizers

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return adopt(*arguments)

    monkeypatch.setattr("memcompile.planning.plan.adopt_optimizers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        memcompile.plan(model, memory_layers=1, **MEMORY)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert memcompile.explain(model).planned
    with pytest.raises(KeyboardInterrupt):  # the handler of before is back
        signal.raise_signal(signal.SIGINT)
