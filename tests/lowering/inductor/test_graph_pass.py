"""The cache key: processes apart, unchanged sources hit Inductor's cache and changed sources or options miss it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

from memcompile.lowering.inductor.graph_pass import LoweringPass, inductor_patches

ROOT = Path(__file__).parents[3]

PROGRAM = """
import sys
import torch
from torch._dynamo.utils import counters
from torch._inductor import config
from memcompile.lowering import memory_lookup
from memcompile.lowering.inductor import graph_pass

digest = graph_pass.source_digest()
tensors = [torch.randn(s) for s in ((5, 12), (12, 12), (12,), (2, 2, 7, 3), (49, 10))]

def lookup(*tensors):
    return memory_lookup(*tensors, heads=2, top_k=4)

for argument in sys.argv[1:]:
    options, change = argument.split(",")
    torch._dynamo.reset()
    counters.clear()
    graph_pass.source_digest = lambda: digest + change
    with config.patch(graph_pass.inductor_patches(options)):
        torch.testing.assert_close(torch.compile(lookup, fullgraph=True)(*tensors), lookup(*tensors))
    hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    bypassed = counters["inductor"]["fxgraph_cache_bypass"] + counters["aot_autograd"]["autograd_cache_bypass"]
    print("bypass" if bypassed else "hit" if hits else "miss")
"""


def test_cache_hits_and_misses_across_processes(tmp_path):
    def run(*changes: str) -> list[str]:
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
            "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
            "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
            # A fresh cache has no precompiled headers, and they take longer than this program's kernels.
            "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-c", PROGRAM, *changes]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert run(",") == ["miss"]
    assert run(",", ",changed source", "other options,") == ["hit", "miss", "miss"]


class UserPass(CustomGraphPass):
    def __init__(self):
        self.graphs = 0

    def __call__(self, graph):
        self.graphs += 1

    def uuid(self):
        return "the user's"


def test_the_users_pass_still_runs_and_stays_in_the_key():
    torch._dynamo.reset()
    user = UserPass()
    with config.patch(post_grad_custom_pre_pass=user):
        patches = inductor_patches("options")
    with config.patch(patches | {"fx_graph_cache": False}):
        result = torch.compile(lambda x: x + 1)(torch.ones(3))
    assert torch.equal(result, torch.full((3,), 2.0))
    assert user.graphs == 1
    uuid = patches["post_grad_custom_pre_pass"].uuid()
    assert uuid[0] == "memcompile"
    assert "options" in uuid
    assert "the user's" in uuid


def test_the_key_covers_what_changes_code(monkeypatch):
    keys = set()
    for held_back in (False, True):
        monkeypatch.setattr("memcompile.lowering.inductor.graph_pass.mkl_is_held_back", lambda held=held_back: held)
        for atomics in ("0", "1"):
            monkeypatch.setenv("MEMCOMPILE_ATOMICS", atomics)
            keys |= {LoweringPass("").uuid(), LoweringPass("options").uuid()}
    assert len(keys) == 8


def test_wrapped_passes_run_in_order():
    order = []
    LoweringPass("", [lambda graph: order.append("first"), lambda graph: order.append("second")])(torch.fx.Graph())
    assert order == ["first", "second"]


def test_a_pass_that_asks_for_inference_is_told():
    aware = getattr(torch._inductor.custom_graph_pass, "CustomInferenceAwareGraphPass", None)
    if aware is None:
        pytest.skip("this torch has no inference-aware passes")
    told = []
    own = type("Own", (aware,), {"__call__": lambda self, g, inference: told.append(inference), "uuid": lambda self: 1})
    LoweringPass("", [own()])(torch.fx.Graph(), True)
    assert told == [True]


def test_a_pass_without_uuid_switches_the_cache_off_as_it_does_alone():
    with config.patch(post_grad_custom_pre_pass=lambda graph: None):
        assert inductor_patches("")["post_grad_custom_pre_pass"].uuid() is None


def test_patching_twice_does_not_pile_up():
    with config.patch(inductor_patches("outer")):
        inner = inductor_patches("inner")["post_grad_custom_pre_pass"]
    assert inner.wrapped == ()
