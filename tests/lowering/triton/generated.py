"""Inductor's source, read and compiled: which kernels it launches and what they take, what else it calls and allocates.

The source comes from `fake_gpu.generated_sources`.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton.compiler import ASTSource

from tests.lowering.triton.fake_gpu import fake_gpu
from tests.lowering.triton.offline import Compiled, compile_source

# --- Reading a source -------------------------------------------------------------------------------------------------


def triton_kernels(source: str) -> dict[str, str]:
    """The file of each Triton kernel, by the name that it is launched by."""
    return {launched: text for launched, (_, text) in _kernels(source).items()}


def _kernels(source: str) -> dict[str, tuple[str, str]]:
    """Of each kernel, by the name that it is launched by: its own name, and its file."""
    kernels = {}
    for node in ast.parse(source).body:
        call = node.value if isinstance(node, ast.Assign) else None
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "async_compile.triton":
            name, text = (ast.literal_eval(argument) for argument in call.args[:2])
            kernels[ast.unparse(node.targets[0])] = (name, text)
    return kernels


def launches(source: str) -> list[str]:
    """The Triton kernels that are launched, in order."""
    kernels = _kernels(source)
    called = (ast.unparse(node.func).removesuffix(".run") for node in _calls(source))
    return [name for name in called if name in kernels]


def extern_calls(source: str) -> list[str]:
    """The operators that are called, in order: ``extern_kernels.mm``, ``torch.ops.aten.topk.default``."""
    names = (ast.unparse(node.func) for node in _calls(source))
    return [name for name in names if name.startswith(("extern_kernels.", "torch.ops.", "aten.", "inductor_ops."))]


def allocations(source: str) -> list[tuple[tuple[int | str, ...], torch.dtype]]:
    """Shape and dtype of each buffer that is allocated on the GPU, in order; a symbolic size is its expression."""
    found = []
    for node in _calls(source):
        if ast.unparse(node.func) == "empty_strided_cuda":
            shape, _, dtype = node.args
            assert isinstance(shape, ast.Tuple)
            sizes = (size.value if isinstance(size, ast.Constant) else ast.unparse(size) for size in shape.elts)
            found.append((tuple(sizes), getattr(torch, ast.unparse(dtype).removeprefix("torch."))))
    return found


def _calls(source: str) -> list[ast.Call]:
    """Every call in the order of the text, without those of the benchmark at its end."""
    tree = ast.parse(source)
    tree.body = [
        node
        for node in tree.body
        if not isinstance(node, ast.FunctionDef) or node.name not in ("benchmark_compiled_module", "get_args")
    ]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return sorted(calls, key=lambda node: (node.lineno, node.col_offset))


# --- Compiling a source's kernels -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GeneratedKernel:
    """A Triton kernel of a source, with one of the configurations that Inductor would try.

    Attributes:
        name: what the kernel is launched by.
        options: block sizes, `num_warps` and `num_stages`.
        compiled: its machine code.
    """

    name: str
    options: dict[str, Any]
    compiled: Compiled


_MODULE_NUMBERS = itertools.count()


def compile_kernels(source: str, target: str = "sm_90", configurations: int | None = None) -> list[GeneratedKernel]:
    """Compile each Triton kernel of a source, in each of its configurations or in the first few.

    Args:
        source: from `generated_sources`; with its capability equal to the target's, or the configurations are others'.
        target: one of `offline.TARGETS`.
        configurations: how many of each kernel; None for all.
    """
    capability = int(target.removeprefix("sm_")) if target.startswith("sm_") else 90
    compiled = []
    with fake_gpu(capability), tempfile.TemporaryDirectory() as folder:
        for launched, (name, text) in _kernels(source).items():
            autotuner = _imported(name, text, Path(folder))
            for choice in autotuner.configs[:configurations]:
                options = {"num_warps": choice.num_warps, "num_stages": choice.num_stages}
                code = compile_source(_ast_source(autotuner, choice), target, **options)
                compiled.append(GeneratedKernel(launched, {**choice.kwargs, **options}, code))
    return compiled


def _imported(name: str, text: str, folder: Path) -> Any:
    """Inductor's autotuner around a kernel. Triton reads the kernel's source again, so it must lie in a file."""
    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(f"_generated_{next(_MODULE_NUMBERS)}_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {spec.name: module}):
        spec.loader.exec_module(module)
    return getattr(module, name)


def _ast_source(autotuner: Any, choice: Any) -> ASTSource:
    """As Inductor's own `_precompile_config` makes it, without the launcher that needs a driver."""
    meta, kernel = autotuner.triton_meta, autotuner.fn
    signature = meta["signature"] | {kernel.arg_names[index]: "constexpr" for index in kernel.constexprs}
    return ASTSource(kernel, signature, {**meta["constants"], **choice.kwargs}, meta["configs"][0])
