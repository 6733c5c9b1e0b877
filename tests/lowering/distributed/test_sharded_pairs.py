"""The graphs of a table of pairs that is sharded by rows: which collectives, and that the table is not sent."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch.testing._internal.distributed.fake_pg import FakeStore

from memcompile.lowering import memory_lookup
from memcompile.lowering.distributed.sharded_table import Shards, chunk_sizes
from memcompile.lowering.inductor.graph_pass import inductor_patches
from tests.lowering.cases import VARIANTS

RANKS = 4


@pytest.fixture
def group():
    """The name of a group of which this process is one rank, and no other exists."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    torch._dynamo.reset()
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()
    torch._dynamo.reset()


def test_hits_and_tokens_are_gathered_and_sums_are_scattered(group):
    case, graphs = VARIANTS["pairs"], []

    def keep(graph_module: fx.GraphModule, example_inputs: object) -> object:
        graphs.append(graph_module.graph)
        return make_boxed_func(graph_module.forward)

    tensors = case.tensors()
    shards = Shards(group, chunk_sizes(case.n_keys**2, RANKS), 0, 0)
    tensors[4] = tensors[4].detach()[: shards.own].requires_grad_()
    options = {**case.options, "values_grad": "sparse", "shards": shards, "capacity": case.leading[0]}
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    with torch._inductor.config.patch(inductor_patches("test")):
        torch.compile(lambda *t: memory_lookup(*t, **options), backend=backend, fullgraph=True)(
            *tensors
        ).sum().backward()
    sent = [[n for n in g.nodes if getattr(n.target, "namespace", "") == "_c10d_functional"] for g in graphs]
    forward, backward = (Counter(node.target.overloadpacket.__name__ for node in nodes) for nodes in sent)
    # On the CPU a reduce-scatter is an all-to-all.
    assert forward == {"all_gather_into_tensor": 2, "all_to_all_single": 1, "wait_tensor": 3}
    assert backward == {"all_gather_into_tensor": 1, "all_to_all_single": 2, "wait_tensor": 3}
    of_tokens = RANKS * case.leading[0] * max(case.width, case.value_dim, 2 * case.heads * case.top_k)
    assert all(node.meta["val"].numel() <= of_tokens for nodes in sent for node in nodes)
    assert tensors[4].grad.is_sparse and tensors[4].grad.shape == tensors[4].shape
