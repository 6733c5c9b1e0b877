"""`import memcompile` adds a backend to `torch.compile`, and changes and imports nothing else."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import memcompile

ROOT = Path(__file__).parents[1]


def run(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_changes_torch_compile_and_nothing_else():
    printed = run(
        """
        import sys
        import torch
        from tests.torch_state import changed, dispatcher, torch_state

        state, table, modules = torch_state(), dispatcher(), set(sys.modules)
        import memcompile

        assert torch.compiler.config.cache_key_tag == ""
        assert dispatcher() == table, "the dispatcher"
        after = torch_state()
        print(*changed(state, after), *(after.keys() - state.keys()))
        print(*sorted({name.partition(".")[0] for name in set(sys.modules) - modules} - sys.stdlib_module_names))
        """
    )
    assert printed.splitlines() == ["torch.compile", "memcompile"]


def test_importing_pulls_in_nothing_slow():
    """`import torch` itself imports torch.distributed and torch.fx, and neither Dynamo nor sympy."""
    printed = run(
        """
        import sys
        import torch
        before = set(sys.modules)
        import memcompile
        print(*sorted(set(sys.modules) - before))
        print(*[name for name in ("sympy", "torch._dynamo", "torch._inductor", "numpy") if name in sys.modules])
        """
    )
    new, heavy = printed.split("\n")[:2]
    assert len(new.split()) <= 12, new
    assert set(heavy.split()) <= {"numpy"}  # which torch imports where it is installed


def test_a_worker_that_unpickles_options_imports_no_more():
    printed = run(
        """
        import pickle, sys
        import memcompile
        pickle.loads(pickle.dumps(memcompile.MemoryConfig(n_keys=64)))
        try:
            memcompile.MemoryConfig(n_keys=-1)
        except memcompile.OptionError as error:
            print("refused", "memcompile.runtime" in sys.modules)
        """
    )
    assert printed.split() == ["refused", "False"]


ALL_MODULES = """
    import importlib, pkgutil
    def import_all():
        for module in pkgutil.walk_packages(memcompile.__path__, "memcompile."):
            if module.name != "memcompile.__main__":
                importlib.import_module(module.name)
"""


@pytest.mark.parametrize("first", ["names", "modules"])
def test_public_names_are_what_they_are_in_any_order(first):
    """A submodule that is imported later does not take the place of a function of its name."""
    before, after = {"names": ("", "import_all()"), "modules": ("import_all()", "")}[first]
    run(
        f"""
        import types
        import memcompile
        {textwrap.indent(textwrap.dedent(ALL_MODULES), " " * 8).strip()}
        {before}
        names = {{name: getattr(memcompile, name) for name in memcompile.__all__}}
        {after}
        assert all(getattr(memcompile, name) is value for name, value in names.items())
        modules = {{name for name, value in names.items() if isinstance(value, types.ModuleType)}}
        assert modules == {{"checkpoint", "lowering", "optim", "passes"}}, modules
        assert names.keys() <= set(dir(memcompile))
        assert memcompile.optim.RowAdamW
        """
    )


def test_names_that_are_not_there():
    with pytest.raises(AttributeError, match="module 'memcompile' has no attribute 'nothing'"):
        _ = memcompile.nothing


MODEL = """
    import sys
    import torch
    original = torch.compile
    from torch import nn
    import memcompile
    assert "torch._dynamo" not in sys.modules

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.ffn = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4))

        def forward(self, x):
            return x + self.ffn(x)

    model, x = Model(), torch.ones(2, 3, 4)
    sizes = {"memory_layers": 1, "n_keys": 8, "top_k": 4, "heads": 2}

    def ran(compiled):
        import memcompile.backend
        seen = []
        memcompile.backend.compile_fx = lambda graph, *rest: seen.append(graph) or graph
        torch.testing.assert_close(compiled(x), model(x))
        return len(seen) == 1
"""
WITHOUT_METADATA = """
    import importlib.metadata
    found = importlib.metadata.entry_points
    importlib.metadata.entry_points = lambda **given: importlib.metadata.EntryPoints(
        entry for entry in found(**given) if entry.name != "memcompile"
    ) if given else found()
"""
WAYS = {
    "torch.compile": 'assert ran(torch.compile(model, backend="memcompile", **sizes))',
    "model.compile": 'model.compile(backend="memcompile", **sizes); assert ran(model)',
    "a torch.compile from before the import": """
    memcompile.plan(model, **sizes)
    assert ran(original(model, backend="memcompile"))
    """,
}


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_the_backend_by_its_name(way, installed):
    """Installed, Dynamo knows it by its entry point. From a folder on the path, it knows it once a model is planned."""
    parts = [MODEL, "" if installed else WITHOUT_METADATA, WAYS[way] if "\n" in WAYS[way] else f"    {WAYS[way]}\n"]
    listed = """
    assert "memcompile" in torch._dynamo.list_backends()
    """
    run("".join(map(textwrap.dedent, [*parts, listed])))


def test_without_metadata_the_name_alone_is_unknown_until_a_model_is_planned():
    end = """
    try:
        original(model, backend="memcompile")(x)
    except Exception as error:
        print(type(error).__name__)
    """
    printed = run("".join(map(textwrap.dedent, [MODEL, WITHOUT_METADATA, end])))
    assert printed.split() == ["InvalidBackend"]
