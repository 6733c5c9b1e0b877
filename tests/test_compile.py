"""The front door: every way to reach it, and that it stays out of the way of everything else."""

import functools
import subprocess
import sys
import textwrap
from unittest import mock

import pytest
import torch
from torch import nn

import memcompile
from memcompile import MemoryConfig, OptionError, PlanError
from memcompile.compile import install_front_door
from memcompile.passes.checks.captured_memory import is_lookup
from memcompile.runtime.pool import pool_of
from tests.models import tiny_gpt

SIZES = {"n_keys": 8, "top_k": 4, "heads": 2}
TWO = {"memory_layers": 2, **SIZES}
TOKENS = torch.randint(50, (3, 5))


def planned_first(model):
    memcompile.plan(model, **TWO)
    return torch.compile(model, backend="memcompile")


def module_compile(model):
    model.compile(backend="memcompile", **TWO)
    return model


def function_after_plan(model):
    memcompile.plan(model, **TWO)

    @torch.compile(backend="memcompile")
    def step(tokens):
        return model(tokens)

    return step


def class_of_backend(model):
    from memcompile.backend import memcompile as backend

    return torch.compile(model, backend=backend, **TWO)


FORMS = {
    "keywords": lambda m: torch.compile(m, backend="memcompile", **TWO),
    "model by keyword": lambda m: torch.compile(model=m, backend="memcompile", **TWO),
    "options": lambda m: torch.compile(m, backend="memcompile", options=dict(TWO)),
    "both": lambda m: torch.compile(m, backend="memcompile", options=dict(SIZES), memory_layers=2),
    "config": lambda m: torch.compile(m, backend="memcompile", memory=MemoryConfig(**TWO)),
    "config in options": lambda m: torch.compile(m, backend="memcompile", options={"memory": MemoryConfig(**TWO)}),
    "decorator": lambda m: torch.compile(backend="memcompile", **TWO)(m),
    "decorator with options": lambda m: torch.compile(backend="memcompile", options=dict(TWO))(m),
    "partial": lambda m: functools.partial(torch.compile, backend="memcompile", **TWO)(m),
    "module.compile": module_compile,
    "bound forward": lambda m: torch.compile(m.forward, backend="memcompile", **TWO),
    "backend function": class_of_backend,
    "planned first": planned_first,
    "function after plan": function_after_plan,
    "example inputs": lambda m: torch.compile(m, backend="memcompile", example_inputs=(TOKENS,), **TWO),
    "fullgraph": lambda m: torch.compile(m, backend="memcompile", fullgraph=True, **TWO),
    "dynamic": lambda m: torch.compile(m, backend="memcompile", dynamic=True, **TWO),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form, lowered):
    model = tiny_gpt(layers=2)
    compiled = FORMS[form](model)
    assert sorted(pool_of(model).layers) == ["blocks.0.ffn.2.weight", "blocks.1.ffn.2.weight"]
    output = compiled(TOKENS)
    ((graph, _),) = lowered
    assert sum(map(is_lookup, graph.graph.nodes)) == 2
    assert torch.equal(output, model.forward(TOKENS))


def test_disabled_is_still_planned(lowered):
    model = tiny_gpt()
    compiled = torch.compile(model, backend="memcompile", disable=True, **TWO)
    assert torch.equal(compiled(TOKENS), model(TOKENS))
    assert pool_of(model) is not None and not lowered


def test_inductor_runs_what_eager_runs():
    model = tiny_gpt(layers=2).eval()
    compiled = torch.compile(model, backend="memcompile", **TWO)
    targets = torch.randint(50, TOKENS.shape)
    torch.testing.assert_close(compiled(TOKENS), model(TOKENS))
    compiled(TOKENS, targets).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(TOKENS, targets).backward()
    torch.testing.assert_close(gradients, [p.grad for p in model.parameters()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("again", ["same options", "no options", "the compiled model", "its config"])
def test_compiling_twice_plans_once(again, lowered):
    """Lightning re-applies the options that it saw."""
    model = tiny_gpt()
    compiled = torch.compile(model, backend="memcompile", **TWO)
    before = dict(model.named_parameters())
    if again == "same options":
        compiled = torch.compile(model, backend="memcompile", **TWO)
    elif again == "no options":
        compiled = torch.compile(model, backend="memcompile")
    elif again == "the compiled model":
        compiled = torch.compile(compiled, backend="memcompile", **TWO)
    else:
        compiled = torch.compile(model, backend="memcompile", memory=MemoryConfig(**TWO))
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert torch.equal(compiled(TOKENS), model(TOKENS))


def test_regional_compile_of_a_planned_model(lowered):
    model = tiny_gpt()
    memcompile.plan(model, **TWO)
    before = list(model.parameters())
    expected = model(TOKENS)
    for block in model.blocks:
        block.compile(backend="memcompile")
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(model(TOKENS), expected)
    assert {sum(map(is_lookup, g.graph.nodes)) for g, _ in lowered} == {0, 1}


def test_regional_compile_plans_each_region_that_is_not_planned():
    model = tiny_gpt(layers=2)
    model.blocks[0].compile(backend="memcompile", memory_layers=1, **SIZES)
    assert pool_of(model.blocks[0]).owner is model.blocks[0]
    assert pool_of(model.blocks[1]) is None
    with pytest.raises(PlanError, match=r"parts of Transformer already have a memory \('blocks.0'\)"):
        torch.compile(model, backend="memcompile", memory_layers=1)


def test_a_function_before_plan_is_an_error(monkeypatch):
    monkeypatch.setattr("memcompile.runtime.pool.live_pools", lambda: iter(()))

    @torch.compile(backend="eager")
    def other(x):
        return x + 1

    with pytest.raises(PlanError, match=r"'step' is no nn.Module, and no model has a memory yet: call memcompile.plan"):

        @torch.compile(backend="memcompile")
        def step(x):
            return x

    assert other(torch.ones(1)) == 2


def test_options_for_a_function_are_an_error():
    model = tiny_gpt()
    memcompile.plan(model, **TWO)
    with pytest.raises(OptionError, match=r"heads, memory_layers given for 'step', which is no nn\.Module"):

        @torch.compile(backend="memcompile", memory_layers=2, heads=4)
        def step(x):
            return model(x)


@pytest.mark.parametrize("where", ["keyword", "options"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("memory_layer", "unknown memcompile option 'memory_layer': did you mean 'memory_layers'"),
        ("qqq", "unknown memcompile option 'qqq'"),
    ],
)
def test_unknown_options(where, name, message):
    given = {name: 3} if where == "keyword" else {"options": {name: 3}}
    model = tiny_gpt()
    with pytest.raises(OptionError, match=message):
        torch.compile(model, backend="memcompile", **given)
    assert pool_of(model) is None


def test_misspelt_inductor_options_are_known_too():
    with pytest.raises(OptionError, match="'max_autotun': did you mean 'max_autotune'"):
        torch.compile(tiny_gpt(), backend="memcompile", options={"max_autotun": True})


def test_an_option_given_twice():
    with pytest.raises(OptionError, match="memory_layers is given twice: 2 as a keyword, 1 in options"):
        torch.compile(tiny_gpt(), backend="memcompile", memory_layers=2, options={"memory_layers": 1})


def test_options_are_not_changed():
    options = {"memory_layers": 1, **SIZES, "max_autotune": True}
    torch.compile(tiny_gpt(), backend="memcompile", options=options)
    assert options == {"memory_layers": 1, **SIZES, "max_autotune": True}


def test_mode_reaches_inductor(lowered):
    torch.compile(tiny_gpt(), backend="memcompile", mode="max-autotune-no-cudagraphs", **TWO)(TOKENS)
    ((_, patches),) = lowered
    assert patches["max_autotune"] is True


def test_options_reach_inductor(lowered):
    options = {"max_autotune": True, "triton.cudagraphs": False, **TWO}
    torch.compile(tiny_gpt(), backend="memcompile", options=options)(TOKENS)
    ((_, patches),) = lowered
    assert patches["max_autotune"] is True and patches["triton.cudagraphs"] is False
    assert not set(TWO) & set(patches)


def test_other_keywords_reach_torch():
    model = tiny_gpt()
    with mock.patch.object(torch.compile, "original") as original:
        torch.compile(model, backend="memcompile", fullgraph=True, dynamic=False, mode="default", **TWO)
    (positional, keywords) = original.call_args
    assert positional == (model,)
    backend = keywords.pop("backend")
    assert keywords == {"fullgraph": True, "dynamic": False, "mode": "default"}
    assert backend.pool is pool_of(model) and backend.whole


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"backend": "eager"},
        {"backend": "inductor", "options": {"max_autotune": False}, "fullgraph": True},
        {"backend": lambda module, inputs: module.forward},
        {"mode": "reduce-overhead", "dynamic": True},
        {"backend": "eager", "unknown": 1},
    ],
)
def test_other_backends_are_untouched(keywords):
    model = tiny_gpt(layers=1)
    before = list(model.parameters())
    with mock.patch.object(torch.compile, "original") as original:
        result = torch.compile(model, **keywords)
        without_model = torch.compile(**keywords)
    assert result is without_model is original.return_value
    first, second = original.call_args_list
    assert first.args[0] is model and second.args == (None,)
    for call in (first, second):
        assert call.kwargs.keys() == keywords.keys()
        assert all(call.kwargs[name] is value for name, value in keywords.items())
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))


def test_the_original_is_wrapped_once():
    wrapped = torch.compile
    install_front_door()
    assert torch.compile is wrapped
    assert torch.compile.__name__ == "compile" and torch.compile.__doc__
    assert torch.compile.original is torch.compile.__wrapped__


def test_another_wrapper_on_top_keeps_working(lowered):
    """As Lightning does: it wraps torch.compile, copies its attributes, and calls what it wrapped."""
    ours = torch.compile

    @functools.wraps(ours)
    def theirs(*args, **kwargs):
        return ours(*args, **kwargs)

    model = tiny_gpt()
    with mock.patch.object(torch, "compile", theirs):
        compiled = torch.compile(model, backend="memcompile", **TWO)
    compiled(TOKENS)
    assert len(lowered) == 1


def test_errors_leave_the_model_as_it_was():
    model = tiny_gpt(layers=2)
    before = dict(model.named_parameters())
    for wrong in ({"memory_layers": 3}, {"memory_layers": ["no such"]}, {"heads": 0}, {"n_keys": 8, "top_k": 9}):
        with pytest.raises(memcompile.MemcompileError):
            torch.compile(model, backend="memcompile", **wrong)
        assert dict(model.named_parameters()).keys() == before.keys()
        assert all(model.get_parameter(name) is p for name, p in before.items())


def test_a_model_without_ffn():
    with pytest.raises(PlanError, match="no feed-forward block to replace was found"):
        torch.compile(nn.Linear(3, 4), backend="memcompile")


def run(program):
    source = textwrap.dedent(program)
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)


def test_the_backend_is_listed_without_an_import():
    result = run(
        """
        import sys, torch
        assert "memcompile" in torch._dynamo.list_backends()
        assert "memcompile" not in sys.modules
        """
    )
    assert result.returncode == 0, result.stderr


def test_without_an_import_it_fails_with_the_way_out():
    result = run(
        """
        import torch
        from torch import nn

        class Dense(nn.Module):
            def __init__(self):
                super().__init__()
                self.ffn = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4))

            def forward(self, x):
                return x + self.ffn(x)

        model = torch.compile(Dense(), backend="memcompile")
        print("ran:", model(torch.ones(2, 3, 4)))
        """
    )
    assert result.returncode != 0
    assert "ran:" not in result.stdout
    assert "Add `import memcompile` at the top of the program" in result.stderr
