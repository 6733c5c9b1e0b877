"""explain(): the table that a user reads, before and after planning."""

# ruff: noqa: E501  (the tables are as wide as users see them)

import os
import pathlib
import subprocess
import sys

import torch
from accelerate import cpu_offload
from expecttest import assert_expected_inline
from torch import nn

import memcompile
from memcompile.planning.explain import explain
from tests.models import GATED_HIDDEN, WIDTH, InlineGatedBlock, Transformer, tiny_gpt
from tests.planned import batch

SIZES = {"n_keys": 8, "top_k": 4, "heads": 2}


def hooked():
    model = tiny_gpt()
    model.blocks[1].ffn[0].register_forward_hook(lambda module, args, output: None)
    return model


def test_before():
    assert_expected_inline(
        repr(explain(hooked())),
        """\
memcompile: Transformer, 4 feed-forward block(s) found, not planned yet
#  block         pattern                 width  hidden  calls  FLOPs/token  memory
-  ------------  ----------------------  -----  ------  -----  -----------  -------------------------------------------------------------------------------
0  blocks.0.ffn  linear > gelu > linear  32     128     1      16,384       can be
-  blocks.1.ffn  linear > gelu > linear  32     128     1      16,384       no: module 'blocks.1.ffn.0' has hooks, which would no longer see the projection
1  blocks.2.ffn  linear > gelu > linear  32     128     1      16,384       can be
2  blocks.3.ffn  linear > gelu > linear  32     128     1      16,384       can be
parameters 56,128""",
    )


def test_after():
    model = hooked()
    memcompile.plan(model, memory_layers=2, **SIZES)
    assert_expected_inline(
        repr(explain(model)),
        """\
memcompile: Transformer, 4 feed-forward block(s) found, 2 replaced by memory
#  block         pattern                 width  hidden  calls  FLOPs/token      memory
-  ------------  ----------------------  -----  ------  -----  ---------------  -------------------------------------------------------------------------------
0  blocks.0.ffn  linear > gelu > linear  32     128     1      16,384 -> 7,184  yes
-  blocks.1.ffn  linear > gelu > linear  32     128     1      16,384           no: module 'blocks.1.ffn.0' has hooks, which would no longer see the projection
1  blocks.2.ffn  linear > gelu > linear  32     128     1      16,384           no: not chosen by memory_layers
2  blocks.3.ffn  linear > gelu > linear  32     128     1      16,384 -> 7,184  yes
parameters 56,128 -> 48,320
FLOPs a token in these blocks 65,536 -> 47,136
memory: 64 slots (8 half-keys a side) x 32 in 2 layer(s), 2 heads x top 4, key_dim 16; values float32
values: stepped when the optimizer that holds them steps, by the optimizer's rule where there is one by rows, otherwise row_adamw, at the constant learning rate 0.001""",
    )


def test_after_adding():
    model = tiny_gpt(layers=2)
    explanation = memcompile.plan(model, memory_layers=1, placement="add", **SIZES)
    assert_expected_inline(
        repr(explanation),
        """\
memcompile: Transformer, 2 feed-forward block(s) found, memory added to 1
#  block         pattern                 width  hidden  calls  FLOPs/token       memory
-  ------------  ----------------------  -----  ------  -----  ----------------  -------------------------------
0  blocks.0.ffn  linear > gelu > linear  32     128     1      16,384            no: not chosen by memory_layers
1  blocks.1.ffn  linear > gelu > linear  32     128     1      16,384 -> 23,568  yes
parameters 30,720 -> 36,192
FLOPs a token in these blocks 32,768 -> 39,952
memory: 64 slots (8 half-keys a side) x 32 in 1 layer(s), 2 heads x top 4, key_dim 16; values float32
values: stepped when the optimizer that holds them steps, by the optimizer's rule where there is one by rows, otherwise row_adamw, at the constant learning rate 0.001""",
    )


def test_without_candidates():
    assert_expected_inline(
        repr(explain(nn.Linear(3, 4))),
        """\
memcompile: Linear, 0 feed-forward block(s) found, not planned yet
no linear > activation > linear block on a residual stream was seen
parameters 16""",
    )


def test_numbers():
    model = tiny_gpt()
    dense = sum(p.numel() for p in model.parameters())
    before = explain(model)
    assert (before.planned, before.parameters_before, before.parameters_after) == (False, dense, dense)
    assert before.flops_before == before.flops_after == 4 * 2 * 2 * WIDTH * 4 * WIDTH
    assert [row.index for row in before.rows] == [0, 1, 2, 3]
    memcompile.plan(model, memory_layers=2, **SIZES)
    after = explain(model)
    assert (after.planned, after.parameters_before) == (True, dense)
    assert after.parameters_after == sum(p.numel() for p in model.parameters())
    assert after.flops_before == before.flops_before
    heads, key_dim, n_keys, top_k = 2, WIDTH // 2, 8, 4
    query, gate_and_out = 2 * WIDTH * heads * key_dim, 2 * 2 * WIDTH * WIDTH
    candidates = sum(top_k // (a + 1) for a in range(top_k))
    search, read = 2 * heads * n_keys * key_dim + heads * candidates, 2 * heads * top_k * WIDTH
    assert [row.flops_after for row in after.rows if row.chosen] == [query + gate_and_out + search + read] * 2
    assert [row.reason for row in before.rows] == [""] * 4
    assert [row.reason for row in after.rows] == ["not chosen by memory_layers", ""] * 2


def test_calls_count_in_the_totals():
    model = Transformer([InlineGatedBlock(WIDTH, GATED_HIDDEN)] * 3)
    explanation = explain(model)
    assert explanation.flops_before == 3 * 3 * 2 * WIDTH * GATED_HIDDEN
    assert [row.site.calls for row in explanation.rows] == [3]


def test_it_changes_nothing():
    model = hooked()
    before = dict(model.named_parameters())
    explain(model)
    assert dict(model.named_parameters()).keys() == before.keys()


def test_offloaded_blocks_are_listed():
    """Their weights are on the meta device, and a hook of accelerate's fetches them when the block runs."""
    model = tiny_gpt(layers=3)
    tokens, expected = batch()[0], model(batch()[0])
    cpu_offload(model.blocks[1].ffn, execution_device=torch.device("cpu"))
    rows = explain(model).rows
    assert [row.site.refusal for row in rows] == [
        None,
        "blocks.1.ffn.0.weight is offloaded: plan the model where all of its weights are loaded, and dispatch it "
        "afterwards",
        None,
    ]
    assert torch.equal(model(tokens), expected)


def test_parts_and_wrappers_explain_the_whole():
    model = tiny_gpt()
    planned = repr(memcompile.plan(model, memory_layers=2, **SIZES))
    assert repr(explain(model.blocks[0])) == planned
    assert repr(explain(nn.DataParallel(model))) == planned


def stderr_of_a_plan(**environment):
    program = (
        "import memcompile; from tests.models import tiny_gpt; "
        "memcompile.plan(tiny_gpt(), memory_layers=2, n_keys=8, top_k=4)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_LOGS"} | environment
    command = [sys.executable, "-c", program]
    root = pathlib.Path(__file__).parents[2]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=root).stderr


def test_torch_logs_print_the_plan():
    assert "feed-forward block(s) found" not in stderr_of_a_plan()
    printed = stderr_of_a_plan(TORCH_LOGS="memcompile")
    assert "memcompile: Transformer, 4 feed-forward block(s) found, 2 replaced by memory" in printed
    assert "blocks.3.ffn" in printed
