"""Values that lie in a file: planned, copied, pickled, loaded; and every file that does not fit refused."""

from __future__ import annotations

import copy
import io
import os
import pickle

import pytest
import torch
from torch import nn

import memcompile
from memcompile import MemoryConfig, OptionError, PlanError
from memcompile.runtime.storage import values_file
from memcompile.runtime.storage.frozen_values import MappedValues, open_values
from tests.models import tiny_gpt
from tests.planned import assert_same, batch, planned_gpt
from tests.runtime.storage.stored import SIZES, mapped_gpt, stored, trained


@pytest.fixture
def path(tmp_path):
    return tmp_path / "values.safetensors"


def test_a_new_process_plans_and_loads_all_else(path):
    rest, expected = stored(path)
    model = mapped_gpt(path)
    assert isinstance(model.memory_values, MappedValues) and not model.memory_values.requires_grad
    model.load_state_dict(rest)
    assert torch.equal(model(batch()[0]), expected)
    assert "values float32 for inference, in the file " + str(path) in repr(memcompile.explain(model))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled(path, dynamic):
    rest, expected = stored(path)
    model = tiny_gpt(layers=2)
    options = {"memory_layers": 1, "values_storage": "mmap", "values_path": str(path), **SIZES}
    compiled = torch.compile(model, backend="memcompile", fullgraph=True, dynamic=dynamic, **options)
    model.load_state_dict(rest)
    with torch.no_grad():
        torch.testing.assert_close(compiled(batch()[0]), expected)
        tokens = batch(size=7)[0]
        torch.testing.assert_close(compiled(tokens), model(tokens))


def test_planning_again_with_the_same_options_changes_nothing(path):
    stored(path)
    model = mapped_gpt(path)
    values = model.memory_values
    memcompile.plan(model, memory_layers=1, values_storage="mmap", values_path=path, **SIZES)
    assert model.memory_values is values
    with pytest.raises(PlanError, match=r"already has a memory planned with .*'values_storage': 'mmap'"):
        memcompile.plan(model, values_storage="device")


def test_the_rest_learns(path):
    rest, _ = stored(path)
    model, twin = mapped_gpt(path), planned_gpt(n_keys=16)
    model.load_state_dict(rest)
    twin.load_state_dict({**rest, "memory_values": open_values(str(path))})
    found, expected = (dict(m.named_parameters()) for m in (model, twin))
    model(*batch()).backward()
    twin(*batch()).backward()
    assert model.memory_values.grad is None
    del found["memory_values"]
    assert_same({n: p.grad for n, p in found.items()}, {n: expected[n].grad for n in found})


# --- copies -------------------------------------------------------------------------------------------------------


def test_a_copy_reads_the_same_memory(path):
    rest, expected = stored(path)
    model = mapped_gpt(path)
    model.load_state_dict(rest)
    twin = copy.deepcopy(model)
    assert twin.memory_values is not model.memory_values
    assert twin.memory_values.data_ptr() == model.memory_values.data_ptr()
    assert twin._apply.args == (twin,)
    assert torch.equal(twin(batch()[0]), expected)
    twin.double()
    assert (twin.norm.weight.dtype, model.norm.weight.dtype) == (torch.float64, torch.float32)
    assert torch.equal(model(batch()[0]), expected)


def by_pickle(model: nn.Module) -> tuple[nn.Module, int]:
    content = pickle.dumps(model)
    return pickle.loads(content), len(content)


def by_torch_save(model: nn.Module) -> tuple[nn.Module, int]:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False), file.getbuffer().nbytes


@pytest.mark.parametrize("pickled", [by_pickle, by_torch_save])
def test_pickled_it_is_its_path(path, pickled):
    model = planned_gpt(n_keys=64)
    memcompile.store_values(model, path)
    twin, size = pickled(model)
    assert size < model.memory_values.nbytes
    assert twin.memory_values.path == str(path)
    assert torch.equal(twin(batch()[0]), model(batch()[0]))
    values_file.write(str(path), torch.randn(64**2, 32))
    with pytest.raises(PlanError, match="has other rows than when the model was saved"):
        pickled(model)


def test_a_file_that_is_replaced_is_read_on(path):
    rest, expected = stored(path)
    model = mapped_gpt(path)
    model.load_state_dict(rest)
    values_file.write(str(path), torch.randn(16**2, 32))
    assert torch.equal(model(batch()[0]), expected)
    os.remove(path)
    assert torch.equal(model(batch()[0]), expected)


# --- state dicts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
def test_its_state_dict_is_whole_and_loads_anywhere(path, assign):
    rest, expected = stored(path)
    model = mapped_gpt(path)
    model.load_state_dict(rest, assign=assign)
    state = model.state_dict()
    assert state["memory_values"].data_ptr() == model.memory_values.data_ptr()  # read when somebody does
    assert type(state["memory_values"]) is torch.Tensor
    model.load_state_dict(state, assign=assign)  # its own
    assert isinstance(model.memory_values, MappedValues)
    assert torch.equal(model(batch()[0]), expected)

    config = memcompile.config_from(state)
    assert (config.values_storage, config.values_path) == ("device", None)  # of a machine, not of a checkpoint
    other = tiny_gpt(layers=2)
    memcompile.plan(other, memory=config)
    other.load_state_dict(state)
    assert torch.equal(other(batch()[0]), expected)


def test_a_file_is_not_loaded_over(path):
    model, _ = trained()
    state = model.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    memcompile.store_values(model, path)
    content = path.read_bytes()
    with pytest.raises(PlanError, match=r"load_state_dict\(\) does not write: leave 'memory_values' out"):
        mapped_gpt(path).load_state_dict({**before, "memory_values": before["memory_values"] + 1})
    assert path.read_bytes() == content


def test_a_model_inside_another(path):
    rest, expected = stored(path)
    model = nn.Sequential(mapped_gpt(path))
    model.load_state_dict({f"0.{name}": tensor for name, tensor in rest.items()})
    model.load_state_dict(model.state_dict())
    assert torch.equal(model(batch()[0]), expected)


def test_a_dense_checkpoint_loads(path):
    stored(path)
    dense, model = tiny_gpt(layers=2), mapped_gpt(path)
    content = path.read_bytes()
    model.load_state_dict(dense.state_dict())
    assert torch.equal(model.head.weight, dense.head.weight)
    assert path.read_bytes() == content


def test_a_checkpoint_beside_another_file_is_refused(path):
    rest, _ = stored(path)
    values_file.write(str(path), torch.randn(16**2, 32))
    with pytest.raises(PlanError, match="the checkpoint was saved beside another file of values"):
        mapped_gpt(path).load_state_dict(rest)


# --- what does not fit --------------------------------------------------------------------------------------------


def test_no_file(path):
    model = tiny_gpt(layers=2)
    names = list(model.state_dict())
    with pytest.raises(PlanError, match=rf"the file of values '{path}' cannot be read \(No such file"):
        memcompile.plan(model, memory_layers=1, values_storage="mmap", values_path=path, **SIZES)
    assert list(model.state_dict()) == names  # as it was


@pytest.mark.parametrize("options", [{"n_keys": 8}, {"value_dim": 24}], ids=str)
def test_a_table_of_another_size(path, options):
    stored(path)
    with pytest.raises(PlanError, match=r"has 256 rows of 32 numbers in 1 table\(s\), and the model's memory "):
        mapped_gpt(path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"variant": "peer", "value_dim": 16, "n_keys": 16},
            r"has 256 rows of 48 numbers \(32 of u, the rest of v\) in 1 table\(s\), and the model's memory 256 rows "
            r"of 48 numbers in 1 table\(s\): plan with the n_keys, value_dim, variant and tables that",
        ),
        (
            {"tables": "separate", "value_dim": 48, "memory_layers": 4},
            r"has 256 rows of 48 numbers in 4 table\(s\), and the model's memory 256 rows of 48 numbers in 1 table",
        ),
    ],
    ids=["pairs", "tables"],
)
def test_a_table_of_another_form_and_the_same_shape(path, options, message, monkeypatch):
    plain = {"n_keys": 16, "value_dim": 48, "values_storage": "mmap", "values_path": path}
    memcompile.store_values(planned_gpt(layers=4, **options), path)
    with pytest.raises(PlanError, match=message):
        planned_gpt(layers=4, **plain)
    own = planned_gpt(layers=4, **options | {"values_storage": "mmap", "values_path": path})
    assert own.memory_values.shape == (256, 48)
    monkeypatch.setattr("memcompile.runtime.storage.store.form_of", lambda config, width: {})
    memcompile.store_values(own, path)  # as earlier versions wrote it, without its form
    assert planned_gpt(layers=4, **plain).memory_values.shape == (256, 48)


def test_a_table_of_another_dtype(path):
    stored(path)
    model = tiny_gpt(layers=2).bfloat16()
    with pytest.raises(PlanError, match=r"has torch.float32, and the model torch.bfloat16: plan the model in"):
        memcompile.plan(model, memory_layers=1, values_storage="mmap", values_path=path, **SIZES)


def test_a_table_that_is_cut_off(path):
    stored(path)
    os.truncate(path, 5000)
    with pytest.raises(PlanError, match=r"has 5,000 bytes, and its header means 36,864: it is not whole"):
        mapped_gpt(path)


def test_it_does_not_learn(path):
    stored(path)
    model = mapped_gpt(path)
    for unfreeze in (model.requires_grad_, model.memory_values.requires_grad_):
        with pytest.raises(PlanError, match="do not learn: to train them, plan with values_storage='device'"):
            unfreeze()
    model.requires_grad_(False)
    model.memory_values.requires_grad = True
    for train in (model, torch.compile(model, backend="memcompile")):
        with pytest.raises(Exception, match=r"values: those of values_storage='mmap' do not learn"):
            train(*batch())


def test_it_is_not_drawn_anew(path):
    stored(path)
    with pytest.raises(PlanError, match=f"the values lie in '{path}', for inference"):
        memcompile.reset_parameters(mapped_gpt(path))


def test_a_captured_graph_has_no_file(path):
    program = torch.export.export(tiny_gpt(layers=2), (batch()[0],)).module()
    memory = MemoryConfig(values_storage="mmap", values_path=str(path), **SIZES)
    with pytest.raises(OptionError, match="values_storage='mmap' is of live models: plan the model so, and export it"):
        memcompile.passes.rewrite(program, memcompile.find_ffns(program), memory=memory)


def test_it_is_exported(path):
    rest, expected = stored(path)
    model = mapped_gpt(path)
    model.load_state_dict(rest)
    program = torch.export.export(model, (batch()[0],))
    assert torch.equal(program.module()(batch()[0]), expected)
