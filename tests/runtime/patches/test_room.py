"""The room of patches: nothing else in the package changes PyTorch, and what is changed while planned models live is
put back when the last of them is gone.
"""

from __future__ import annotations

import ast
import importlib
import pickle
import pkgutil
import textwrap
from pathlib import Path

import pytest

from memcompile.common.patch import Patch
from memcompile.runtime import patches
from memcompile.runtime.pool import pool_of
from tests.planned import planned_gpt
from tests.test_import import ALL_MODULES, ROOT, run

PACKAGE = ROOT / "memcompile"
FILES = [name for _, name, _ in pkgutil.iter_modules(patches.__path__)]

# The front door; while a model is traced; and the tag of the caches, a public option: lowering sets it where an
# operator is compiled and no model is planned.
CHANGES_TORCH = {
    "memcompile/compile.py": {"torch.compile"},
    "memcompile/lowering/inductor/caches.py": {"torch.compiler.config.cache_key_tag"},
    "memcompile/passes/capture/sandbox.py": {"torch.autograd.Function.apply"},
}


def test_each_file_is_a_patch_that_some_model_needs():
    assert set(FILES) == set(patches.needed_by(pool_of(planned_gpt())))


@pytest.mark.parametrize("name", FILES)
def test_each_patch_says_why(name):
    module = importlib.import_module(f"memcompile.runtime.patches.{name}")
    assert isinstance(module.PATCH, Patch) and module.PATCH.changes
    lines = module.__doc__.splitlines()
    for start in ("No public way: ", "Until: ", "The same: "):
        assert sum(line.startswith(start) for line in lines) == 1, start


# --- nothing else changes PyTorch ------------------------------------------------------------------------------------


class _Changes(ast.NodeVisitor):
    """What a file assigns to, deletes from or registers with what it imports from PyTorch, as it is written."""

    def __init__(self, tree: ast.AST) -> None:
        self.torch: set[str] = set()  # names of this file that are PyTorch's modules, classes and functions
        self.found: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self._bind(alias.asname or alias.name.partition(".")[0], alias.name)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    self._bind(alias.asname or alias.name, str(node.module))
        self.visit(tree)

    def _bind(self, name: str, source: str) -> None:
        if source.partition(".")[0] == "torch" or source.endswith("._torch"):
            self.torch.add(name)

    def _root(self, node: ast.AST) -> str | None:
        while isinstance(node, (ast.Attribute, ast.Subscript)):
            node = node.value
        return node.id if isinstance(node, ast.Name) else None

    def _target(self, target: ast.AST) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            for element in target.elts:
                self._target(element)
        elif isinstance(target, (ast.Attribute, ast.Subscript)) and self._root(target) in self.torch:
            self.found.add(ast.unparse(target))

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._target(target)
            if isinstance(target, ast.Name) and isinstance(node.value, (ast.Attribute, ast.Name)):
                self._alias(target.id, node.value)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._target(node.target)
        if isinstance(node.target, ast.Name) and isinstance(node.value, (ast.Attribute, ast.Name)):
            self._alias(node.target.id, node.value)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._target(node.target)
        self.generic_visit(node)

    def visit_Delete(self, node: ast.Delete) -> None:
        for target in node.targets:
            self._target(target)

    def visit_Call(self, node: ast.Call) -> None:
        called = ast.unparse(node.func)
        last = called.rpartition(".")[2]
        if last in ("setattr", "delattr") and node.args and self._root(node.args[0]) in self.torch:
            self.found.add(ast.unparse(node))
        is_global_hook = last.startswith(("register_optimizer_step_", "register_module_"))
        if is_global_hook and self._root(node.func) in self.torch:
            self.found.add(called)
        if called == "mock.patch.object" and self._root(node.args[0]) in self.torch:
            self.found.add(f"{ast.unparse(node.args[0])}.{ast.literal_eval(node.args[1])}")
        if last == "Library" and node.args and ast.unparse(node.args[0]) != "NAMESPACE":
            self.found.add(ast.unparse(node))
        self.generic_visit(node)

    def _alias(self, name: str, value: ast.AST) -> None:
        if self._root(value) in self.torch:
            self.torch.add(name)


def changes_in(source: str) -> set[str]:
    return _Changes(ast.parse(source)).found


def test_nothing_else_in_the_package_changes_pytorch():
    room = PACKAGE / "runtime" / "patches"
    found = {
        path.relative_to(ROOT).as_posix(): changes
        for path in sorted(PACKAGE.rglob("*.py"))
        if room not in path.parents and (changes := changes_in(path.read_text()))
    }
    assert found == CHANGES_TORCH


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.compile = f",
        "import torch.nn as n\nn.Module.forward = f",
        "from torch import nn\nnn.Module.a, b = f, g",
        "from torch.optim import Optimizer\ndel Optimizer.step",
        "from torch.optim import Optimizer\nsetattr(Optimizer, name, f)",
        "from memcompile.runtime._torch import autograd\nmodule = autograd\nmodule._engine_run_backward = f",
        "from torch.nn.modules.module import _global_forward_hooks as hooks\nhooks[0] = f",
        "from torch.optim.optimizer import register_optimizer_step_pre_hook\nregister_optimizer_step_pre_hook(f)",
        "import torch\ntorch.nn.modules.module.register_module_forward_hook(f)",
        "import torch\ntorch.library.Library('aten', 'IMPL')",
        "import torch\ndef f():\n    torch.backends.flag += 1",
        "import torch\nmock.patch.object(torch.Tensor, 'data', f)",
    ],
)
def test_changes_are_seen(source):
    assert changes_in(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\nx = torch.ones(3)\nx.grad = None",
        "import torch\nmodule.register_forward_hook(f)",
        "import torch\nself.original = torch.compile",
        "import torch\ntorch.library.Library(NAMESPACE, 'DEF')",
    ],
)
def test_what_is_no_change(source):
    assert not changes_in(source)


# --- what is changed, and for how long -------------------------------------------------------------------------------

ALWAYS = {
    "torch.compiler.config.cache_key_tag",
    "torch.nn.modules.module.Module.load_state_dict",
    "torch.nn.modules.module.Module.to_empty",
    "torch.nn.parallel.distributed.DistributedDataParallel.__init__",
    "torch.optim.optimizer.Optimizer.load_state_dict",
    "torch.optim.optimizer.Optimizer.__getstate__",
    "torch.optim.optimizer._global_optimizer_pre_hooks",
    "body_of_step(torch.optim.AdamW.step)",
}
SPARSE = {"aten::clamp_", "aten::clamp_min_", "aten::clamp_max_", "aten::_amp_foreach_non_finite_check_and_unscale_"}
SHARDED = {
    "torch.autograd._engine_run_backward",
    "torch._amp_foreach_non_finite_check_and_unscale_",
    "torch.nn.utils.clip_grad._get_total_norm",
    "torch.nn.utils.clip_grad._clip_grads_with_norm_",
    "torch.nn.utils.clip_grad.clip_grad_value_",
    "torch.nn.utils.get_total_norm",
    "torch.nn.utils.clip_grads_with_norm_",
    "torch.nn.utils.clip_grad_value_",
    "torch.amp.grad_scaler.GradScaler.unscale_",
    "torch.amp.grad_scaler.GradScaler.step",
    "torch.distributed.fsdp._fully_shard._fsdp_init._get_managed_states",
}
DISTRIBUTED = {"torch.distributed.pipelining.stage._PipelineStageBase.__init__"}
NORMS = {"aten::linalg_vector_norm"}  # which have kernels of PyTorch's own from 2.15 on

LIFE = """
    import copy, gc, sys
    import torch
    import torch.distributed as dist
    import torch._inductor.compile_fx
    import memcompile
    import memcompile.backend
    from memcompile.runtime._torch import body_of_step
    from tests.planned import batch, planned_gpt
    from tests.torch_state import changed, dispatcher, torch_state
    {all_modules}
    import_all()
    memcompile.backend.compile_fx = lambda graph, *rest: graph  # Inductor takes long, and has state of its own
    {setup}

    def use(sharded, **options):
        model = planned_gpt(**options)
        if sharded:
            memcompile.shard(model, dist.init_device_mesh("cpu", (1,), mesh_dim_names=("memory",)))
        optimizer = torch.optim.AdamW(model.parameters())
        compiled = torch.compile(model, backend="memcompile")
        for run in (model, compiled):
            run(*batch()).backward()
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        return [model, optimizer, compiled] + ([] if sharded else [copy.deepcopy(model)])

    def now():
        # Of what Dynamo has compiled there are counters, which are no one's behaviour.
        state = {{n: v for n, v in torch_state().items() if callable(v) or "._global_" in n}}
        state["body_of_step(torch.optim.AdamW.step)"] = body_of_step(torch.optim.AdamW.step).cell_contents
        return state | {{"torch.compiler.config.cache_key_tag": torch.compiler.config.cache_key_tag}} | dispatcher()

    use({sharded}, {options})  # what PyTorch imports and registers in its first compilation is there
    torch._dynamo.reset()
    gc.collect()
    before = now()
    held = use({sharded}, {options})
    print(*changed(before, now()))
    while held:
        del held[0]
        gc.collect()
        if len(held) == 1:
            print(*changed(before, now()))
    print(*changed(before, now()))
    {end}
"""
KINDS = {
    "dense": ("", 'values_grad="dense"', ALWAYS),
    "sparse": ("", 'values_grad="sparse"', ALWAYS | SPARSE),
    "distributed": ("gloo", 'values_grad="dense"', ALWAYS | DISTRIBUTED),
    "sharded": ("gloo", 'values_grad="sparse"', ALWAYS | SPARSE | SHARDED | DISTRIBUTED),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_changed_while_a_planned_model_lives_is_put_back(kind):
    """The last object that lives is a copy of the model, or the compiled model."""
    group, options, expected = KINDS[kind]
    store = "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)"
    program = textwrap.dedent(LIFE).format(
        all_modules=textwrap.dedent(ALL_MODULES),
        setup=store if group else "",
        options=options,
        sharded=kind == "sharded",
        end="import os; sys.stdout.flush(); os._exit(0)",  # gloo can abort while the interpreter takes itself apart
    )
    whole, late, after = (set(line.split()) for line in run(program).split("\n")[:3])
    assert whole - NORMS == expected
    assert late - NORMS == expected
    assert after == set()


def test_a_model_that_is_unpickled_has_them_too(tmp_path: Path):
    path = tmp_path / "model"
    path.write_bytes(pickle.dumps(planned_gpt()))
    printed = run(
        f"""
        import pickle
        from torch import nn
        original = nn.Module.load_state_dict
        import memcompile
        print(nn.Module.load_state_dict is original)
        with open({str(path)!r}, "rb") as file:
            model = pickle.load(file)
        print(nn.Module.load_state_dict is original)
        """
    )
    assert printed.split() == ["True", "False"]


def test_a_plan_that_fails_leaves_nothing():
    printed = run(
        """
        import gc
        from torch import nn
        original = nn.Module.load_state_dict
        import memcompile
        from memcompile.planning import plan as planning
        from tests.models import tiny_gpt

        def install(pool, root, chosen, operations):
            assert nn.Module.load_state_dict is not original
            raise MemoryError
        planning.install = install
        try:
            memcompile.plan(tiny_gpt(), memory_layers=1)
        except MemoryError:
            pass
        gc.collect()
        print(nn.Module.load_state_dict is original)
        """
    )
    assert printed.split() == ["True"]


def test_a_second_plan_adds_what_is_needed_by_then():
    printed = run(
        """
        import os, sys
        import torch.distributed as dist
        from torch.distributed.pipelining.stage import _PipelineStageBase
        original = _PipelineStageBase.__init__
        import memcompile
        from tests.planned import planned_gpt

        model = planned_gpt()
        print(_PipelineStageBase.__init__ is original)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        memcompile.plan(model)
        print(_PipelineStageBase.__init__ is original)
        sys.stdout.flush()
        os._exit(0)
        """
    )
    assert printed.split() == ["True", "False"]
