"""MemoryConfig: defaults, validation of every option, and JSON."""

import dataclasses
import json
import math
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import memcompile
from memcompile import MemoryConfig, OptionError
from tests.models import tiny_gpt


def test_defaults_are_those_of_the_paper():
    assert dataclasses.asdict(MemoryConfig()) == {
        "memory_layers": 3,
        "placement": "replace",
        "n_keys": None,
        "heads": 4,
        "top_k": 32,
        "key_dim": None,
        "value_dim": None,
        "variant": "memory+",
        "weighting": "softmax",
        "tables": "shared",
        "gate": None,
        "query_norm": None,
        "qk_norm": False,
        "balance_loss": 0.0,
        "values_lr": 1e-3,
        "values_grad": "auto",
        "values_optimizer": None,
        "values_state_dtype": "float32",
        "values_storage": "device",
        "values_path": None,
    }


def test_it_is_a_value():
    config = MemoryConfig(memory_layers=[1, 2], heads=2)
    assert config == MemoryConfig(memory_layers=(1, 2), heads=2)
    assert hash(config) == hash(MemoryConfig(memory_layers=(1, 2), heads=2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.heads = 8
    with pytest.raises(TypeError):
        MemoryConfig(3)
    assert pickle.loads(pickle.dumps(config)) == config


WRONG = [
    ("memory_layers", 0, "which leaves nothing to replace"),
    ("memory_layers", -1, "which leaves nothing to replace"),
    ("memory_layers", True, "got True"),
    ("memory_layers", 2.0, "got 2.0"),
    ("memory_layers", None, "got None"),
    ("memory_layers", "", "got ''"),
    ("memory_layers", b"all", "got b'all'"),
    ("memory_layers", [], "got an empty list"),
    ("memory_layers", [0, 1.5], "the list holds 1.5"),
    ("memory_layers", [False], "the list holds False"),
    ("memory_layers", {1, 2}, r"got \{1, 2\}"),
    ("placement", "beside", "placement must be 'replace' or 'add', got 'beside'"),
    ("placement", None, "placement must be 'replace' or 'add', got None"),
    ("values_grad", "lazy", "values_grad must be 'auto', 'dense' or 'sparse', got 'lazy'"),
    (
        "values_optimizer",
        "adam",
        "None, 'row_adamw', 'lazy_adam', 'row_wise_adagrad' or 'row_sgd', got 'adam'",
    ),
    ("values_state_dtype", "float16", "values_state_dtype must be 'float32' or 'bfloat16', got 'float16'"),
    ("n_keys", 0, "n_keys must be an integer >= 1 or None, got 0"),
    ("n_keys", 64.0, "n_keys must be an integer >= 1 or None, got 64.0"),
    ("n_keys", True, "n_keys must be an integer"),
    ("n_keys", 46341, "n_keys must be at most 46340"),
    ("n_keys", 16, "top_k=32 exceeds n_keys=16: lower top_k or raise n_keys"),
    ("heads", 0, "heads must be an integer >= 1, got 0"),
    ("heads", None, "heads must be an integer >= 1, got None"),
    ("heads", "4", "heads must be an integer >= 1, got '4'"),
    ("top_k", 0, "top_k must be an integer >= 1, got 0"),
    ("top_k", None, "top_k must be an integer >= 1, got None"),
    ("key_dim", 7, r"key_dim must be even \(two half-keys share it\), got 7"),
    ("key_dim", -2, "key_dim must be an integer >= 1 or None"),
    ("value_dim", 0, "value_dim must be an integer >= 1 or None"),
    ("variant", "memory++", "variant must be 'memory\\+', 'memory', 'pkm' or 'peer', got 'memory\\+\\+'"),
    ("weighting", "linear", "weighting must be 'softmax' or 'sigmoid', got 'linear'"),
    ("tables", 2, "tables must be 'shared' or 'separate', got 2"),
    ("query_norm", True, "query_norm must be None, 'none' or 'batch', got True"),
    ("gate", 1, "gate must be True, False or None, got 1"),
    ("balance_loss", -0.1, "balance_loss must be a factor >= 0, got -0.1"),
    ("balance_loss", math.inf, "balance_loss must be a factor >= 0"),
    ("balance_loss", None, "balance_loss must be a factor >= 0, got None"),
    ("qk_norm", "yes", "qk_norm must be True or False, got 'yes'"),
    ("values_lr", -1e-3, "values_lr must be a learning rate >= 0 or None"),
    ("values_lr", math.inf, "values_lr must be"),
    ("values_lr", math.nan, "values_lr must be"),
    ("values_lr", True, "values_lr must be"),
    ("values_lr", "1e-3", "values_lr must be"),
    ("values_storage", "disk", "values_storage must be 'device', 'host' or 'mmap', got 'disk'"),
    ("values_storage", "mmap", r"values_storage='mmap' needs values_path='...', the file that memcompile.store_values"),
    ("values_path", "table", "values_path='table' is of values_storage='mmap', got values_storage='device': give both"),
    ("values_path", "", "values_path must be the path of a file or None, got ''"),
    ("values_path", 3, "values_path must be the path of a file or None, got 3"),
]


@pytest.mark.parametrize(("option", "value", "message"), WRONG, ids=[f"{o}={v!r}" for o, v, _ in WRONG])
def test_wrong_values_are_errors_that_name_the_option(option, value, message):
    with pytest.raises(OptionError, match=f"{message}") as caught:
        MemoryConfig(**{option: value})
    assert option in str(caught.value)
    assert isinstance(caught.value, ValueError)


STORAGES = [{"values_storage": "host"}, {"values_storage": "mmap", "values_path": "table"}]


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize(
    ("option", "value", "default"),
    [
        ("values_grad", "dense", "'auto'"),
        ("values_optimizer", "row_adamw", "None"),
        ("values_state_dtype", "bfloat16", "'float32'"),
    ],
)
def test_values_that_do_not_learn_take_no_options_of_learning(storage, option, value, default):
    expected = rf"{option}='{value}' is for values that learn.*leave it out \({option}={default}\), or use values_sto"
    with pytest.raises(OptionError, match=expected):
        MemoryConfig(**storage, **{option: value})


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_values_that_do_not_learn_have_a_dense_gradient_of_nothing(storage):
    config = MemoryConfig(n_keys=1024, **storage)
    assert config.frozen and config.gradient == "dense"
    assert not MemoryConfig().frozen


def test_a_path_is_kept_as_text():
    config = MemoryConfig(values_storage="mmap", values_path=Path("some") / "table")
    assert config.values_path == os.path.join("some", "table")
    assert MemoryConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("memory_layers", 1),
        ("memory_layers", ("a", -1, 0)),
        ("memory_layers", "all"),
        ("memory_layers", "decoder.*"),
        ("placement", "add"),
        ("n_keys", 46340),
        ("n_keys", 32),
        ("key_dim", 2),
        ("value_dim", 1),
        ("values_lr", 0),
        ("values_lr", None),
        ("heads", 1),
        ("balance_loss", 0),
    ],
)
def test_limits_themselves_are_allowed(option, value):
    assert getattr(MemoryConfig(**{option: value}), option) == value


def test_separate_tables_are_together_a_table_that_int32_can_number():
    assert MemoryConfig(tables="separate", memory_layers=["a", "b"], n_keys=32768).slots == 2**31
    with pytest.raises(OptionError, match=r"tables='separate' has 3,221,225,472 slots in 3 layers.*lower n_keys"):
        MemoryConfig(tables="separate", memory_layers=3, n_keys=32768)


def test_the_gradient_is_sparse_from_so_many_slots_of_all_layers_on():
    assert MemoryConfig(n_keys=150, memory_layers=3).gradient == "dense"
    assert MemoryConfig(n_keys=150, memory_layers=3, tables="separate").gradient == "sparse"


def test_unknown_options_suggest_the_nearest():
    with pytest.raises(OptionError, match="unknown memcompile option 'memory_layer': did you mean 'memory_layers'"):
        MemoryConfig.from_dict({"memory_layer": 3})
    with pytest.raises(
        OptionError, match="unknown memcompile option 'zzz': options are memory_layers, placement, n_keys, heads"
    ):
        MemoryConfig.from_dict({"zzz": 3})


configs = st.builds(
    MemoryConfig,
    memory_layers=st.integers(1, 9)
    | st.text(min_size=1, max_size=5)
    | st.lists(st.integers(-9, 9) | st.text(max_size=5), min_size=1, max_size=4),
    placement=st.sampled_from(["replace", "add"]),
    n_keys=st.none() | st.integers(32, 1024),
    heads=st.integers(1, 8),
    top_k=st.integers(1, 32),
    key_dim=st.none() | st.integers(1, 64).map(lambda n: 2 * n),
    value_dim=st.none() | st.integers(1, 64),
    variant=st.sampled_from(["memory+", "memory", "pkm", "peer"]),
    weighting=st.sampled_from(["softmax", "sigmoid"]),
    tables=st.sampled_from(["shared", "separate"]),
    gate=st.none() | st.booleans(),
    query_norm=st.sampled_from([None, "none", "batch"]),
    balance_loss=st.floats(0, 1),
    qk_norm=st.booleans(),
    values_lr=st.none() | st.floats(0, 1),
)


@given(configs)
def test_json_round_trip(config):
    assert MemoryConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@given(configs)
def test_the_form_of_a_config_means_what_the_config_means(config):
    resolved = MemoryConfig(**config.form)
    assert config.form == resolved.form == {name: getattr(resolved, name) for name in config.form}
    assert (resolved.has_gate, resolved.has_batch_norm) == (config.has_gate, config.has_batch_norm)
    assert (resolved.variant == "peer") is (config.variant == "peer")


def test_a_filter_stays_out_of_json():
    config = MemoryConfig(memory_layers=lambda site: True)
    with pytest.raises(OptionError, match="filter cannot be serialised: name the layers"):
        config.to_dict()
    assert MemoryConfig(**config.as_options()) == config


def test_the_config_travels_in_the_state_dict():
    model = tiny_gpt()
    memcompile.plan(model, memory_layers=[0, -1], n_keys=16, top_k=8, heads=2, qk_norm=True)
    config = memcompile.config_from(model.state_dict())
    assert config == MemoryConfig(
        memory_layers=["blocks.0.ffn.2.weight", "blocks.3.ffn.2.weight"],
        n_keys=16,
        top_k=8,
        heads=2,
        key_dim=16,
        value_dim=32,
        gate=True,
        query_norm="none",
        qk_norm=True,
    )
    again = tiny_gpt()
    memcompile.plan(again, memory=config)
    again.load_state_dict(model.state_dict())
    with pytest.raises(memcompile.PlanError, match="holds no memory"):
        memcompile.config_from(tiny_gpt().state_dict())
