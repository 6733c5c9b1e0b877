"""A whole planned model through the real Inductor: which kernels its code calls, for any number of tokens, in any mode,
and from the caches in the next process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code

import memcompile
from memcompile.backend import Backend
from memcompile.lowering import cpu
from memcompile.runtime.pool import pool_of
from tests.models import tiny_gpt

pytestmark = pytest.mark.skipif(not cpu.load(), reason="no C++ compiler: the operators run as PyTorch operators here")
ROOT = Path(__file__).parents[3]
ONE = {"memory_layers": 1, "n_keys": 8, "top_k": 4, "heads": 2}


def tokens(count):
    return torch.randint(50, (2, count), generator=torch.Generator().manual_seed(count))


@inductor_config.patch(force_disable_caches=True)  # a cache returns the forward's code and the backward's at once
def test_the_code_calls_our_kernels_and_no_others():
    model = tiny_gpt(layers=1)
    compiled = torch.compile(model, backend="memcompile", fullgraph=True, **ONE)
    output, code = run_and_get_code(lambda: compiled(tokens(7)))
    torch.testing.assert_close(output, model(tokens(7)))
    _, backward = run_and_get_code(lambda: output.sum().backward())
    forward, whole = "".join(code), "".join([*code, *backward])
    for name in ("product_key_search", "weighted_gather"):
        assert forward.count(f"memcompile.{name}.default(") == 1
    assert whole.count("memcompile.gather_dot.default(") == 1
    assert whole.count("memcompile.weighted_scatter.default(") == 2  # values and half-keys
    for foreign in ("embedding_bag", "topk", "sort", "index_put", "bmm"):
        assert f"aten.{foreign}" not in whole.replace("aten._", "aten.")


def test_one_graph_for_any_number_of_tokens():
    model = tiny_gpt(layers=1)
    memcompile.plan(model, **ONE)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, dynamic=True)
    for count in (7, 2, 11, 30):
        torch.testing.assert_close(compiled(tokens(count)), model(tokens(count)))
    assert counter.frame_count == 1


def test_max_autotune():
    model = tiny_gpt(layers=1)
    compiled = torch.compile(model, backend="memcompile", mode="max-autotune", fullgraph=True, **ONE)
    torch.testing.assert_close(compiled(tokens(7)), model(tokens(7)), rtol=1e-4, atol=1e-5)
    compiled(tokens(7)).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_kernels_are_built_before_the_first_step(monkeypatch):
    """Asked for before Inductor traces: what it is given depends on whether they are there."""
    asked, before = [], []
    monkeypatch.setattr("memcompile.backend.cpu.load", lambda: asked.append(True) or True)
    model = tiny_gpt(layers=1)
    memcompile.plan(model, **ONE)
    backend = Backend(pool_of(model), whole=True)
    asked.clear()
    monkeypatch.setattr("memcompile.backend.compile_fx", lambda graph, *_: before.append(len(asked)) or graph.forward)
    monkeypatch.setattr("memcompile.runtime.table.table.ValueTable.watch_gradient", lambda _: asked.clear())
    torch.compile(model, backend=backend, fullgraph=True)(tokens(3))
    assert before == [1]


PROGRAM = """
import torch
import memcompile
from torch._dynamo.utils import counters
from tests.models import plain_ffn

class Residual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.ffn = plain_ffn(8, 32)

    def forward(self, x):
        return x + self.ffn(x)

model, x = Residual(), torch.randn(2, 3, 8)
sizes = {"memory_layers": 1, "n_keys": 4, "top_k": 2, "heads": 1}
with torch.no_grad():
    compiled = torch.compile(model, backend="memcompile", example_inputs=(x,), **sizes)
    torch.testing.assert_close(compiled(x), model(x))
print("hits", counters["aot_autograd"]["autograd_cache_hit"], "misses", counters["aot_autograd"]["autograd_cache_miss"])
"""


def test_the_next_process_starts_warm_and_not_with_the_code_of_other_kernels(tmp_path):
    def run(**variables):
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)} | variables
        environment["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "0"
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert run() == "hits 0 misses 1"
    assert run() == "hits 1 misses 0"
    assert run(MEMCOMPILE_CPU_KERNELS="0") == "hits 0 misses 1"
