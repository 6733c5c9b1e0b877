"""A table of 8 GiB in a process that may have 3: it cannot be held, and is read all the same, eager and compiled."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LINUX = platform.system() == "Linux"

# RLIMIT_DATA bounds what a process may hold of its own; RLIMIT_AS would count what it maps of files too, and those are
# the system's. Rows are holes of the file, zeros, but for those that the tokens hit.
PROGRAM = """
import os, resource, sys
import torch
import torch.nn.functional as F
import memcompile
from memcompile.lowering import cpu
from memcompile.runtime.storage.values_file import header_of
from tests.models import tiny_gpt, WIDTH
from tests.planned import batch

torch.set_num_threads(1)
cpu.load()  # its compiler may need more
path, how = sys.argv[1:]
N, DIM, HEADS, K, LIMIT = 1024, 2048, 2, 4, 3 * 2**30
table = torch.empty(N * N, DIM, device="meta")
assert table.nbytes == 8 * 2**30
header = header_of(table, "0" * 64)
with open(path, "wb") as file:
    file.write(header)
    file.truncate(len(header) + table.nbytes)
resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))


def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


model = tiny_gpt(layers=2)
memory = {"memory_layers": 1, "n_keys": N, "value_dim": DIM, "heads": HEADS, "top_k": K, "key_dim": 8}
try:
    memcompile.plan(tiny_gpt(layers=2), **memory)
except (RuntimeError, MemoryError) as error:
    assert "allocate memory" in str(error), error
else:
    raise AssertionError("the limit is none")
before = anonymous()
memcompile.plan(model, values_storage="mmap", values_path=path, **memory)
for materialise in (model.memory_values.clone, lambda: model.memory_values.to(torch.float64)):
    try:
        materialise()
    except (RuntimeError, MemoryError):
        continue
    raise AssertionError("the limit is none")

layer = model.blocks[1].ffn[2].memory
x = torch.randn(37, WIDTH)
with torch.no_grad():
    # What the layer does, with rows that are made here.
    query = F.linear(x, layer.query_weight, layer.query_bias).view(-1, HEADS, 2, 4)
    scores = torch.einsum("thsd,shnd->sthn", query, layer.half_keys)
    logits, slots = (scores[0, ..., :, None] + scores[1, ..., None, :]).flatten(-2).topk(K)  # of all N * N
    weights = logits.softmax(-1).flatten(1)  # [tokens, hits]
    distinct, position = slots.flatten(1).unique(return_inverse=True)
    rows = torch.randn(len(distinct), DIM)
    with open(path, "r+b") as file:
        for slot, row in zip(distinct.tolist(), rows.numpy(), strict=True):
            file.seek(len(header) + slot * DIM * 4)
            file.write(row.tobytes())
    y = (weights[..., None] * rows[position]).sum(1) * F.silu(F.linear(x, layer.gate_weight, layer.gate_bias))
    expected = F.linear(y, layer.out_weight, layer.out_bias)
    assert expected.abs().max() > 0.1

    if how == "eager":
        torch.testing.assert_close(layer(x), expected)
        run = model
    else:
        compiled = torch.compile(lambda x: layer(x), backend="memcompile", fullgraph=True, dynamic=True)
        torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(compiled(x[:11]), expected[:11])
        run = torch.compile(model, backend="memcompile", fullgraph=True)
    torch.testing.assert_close(run(batch()[0]), model(batch()[0]))
    after = anonymous()
    for seed in range(100):
        run(batch(seed)[0])
    grown = anonymous() - after
    model.load_state_dict(model.state_dict())
assert grown < 2**26, grown
assert how == "compiled" or after - before < 2**28, after - before
print("right")
"""


@pytest.mark.skipif(not LINUX, reason="RLIMIT_DATA counts mappings on Linux alone")
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_a_table_that_the_process_cannot_hold(tmp_path, how):
    path = tmp_path / "values"
    command = [sys.executable, "-c", PROGRAM, str(path), how]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("right\n"), done.stdout + done.stderr[-5000:]
    assert path.stat().st_size > 8 * 2**30 > 2**24 > path.stat().st_blocks * 512  # it is sparse
