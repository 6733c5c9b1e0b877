"""Who trains: a block with a memory layer, by memcompile and by its peers, and the same block with an FFN."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer, SparseAdam

import memcompile
from benchmarks.common.layer import layer_parameters
from benchmarks.common.setting import Layer, fill_table
from benchmarks.training_step import cases
from benchmarks.training_step.cases import Case
from memcompile.lowering import cpu
from memcompile.lowering.register.schema import operator
from memcompile.runtime.optim.row_optimizer import MOMENTS
from memcompile.runtime.pool import MemoryPool, pool_of

HIDDEN_MULTIPLE = 32
LONG = 10_000  # steps
Lookup = Callable[[Tensor, Tensor], Tensor]  # slots and weights [tokens, hits] -> [tokens, value_dim]


@dataclass(frozen=True)
class Trainee:
    """A model that is trained, and its table alone."""

    model: Layer  # x [tokens, width] -> [tokens, width]
    optimizers: tuple[Optimizer, ...]
    lookup: Lookup | None = None  # None: it has no table
    pool: MemoryPool | None = None  # of a planned model

    def finish(self) -> None:
        """What follows on a backward."""
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def age(self, touched: int) -> None:
        """Makes states those of a long training, of which each step touched so many rows at random.

        Rows that were never touched have all missed the same steps and have moments of zero, which is too easy. What
        dense optimizers do takes as long with any state.
        """
        if self.pool is None or self.pool.stepper is None:
            return
        state = self.pool.stepper.rows.state[self.pool.values]
        state["step"] = LONG
        if "last_step" in state:  # int32 [slots]: rows can be behind
            missed = torch.empty(len(state["last_step"])).geometric_(touched / len(state["last_step"])) - 1
            state["last_step"].copy_(LONG - missed.clamp(max=LONG - 1))
        for moment in MOMENTS & state.keys():
            fill_table(state[moment])
            state[moment].abs_()


class SwiGLU(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = -(-8 * width // (3 * HIDDEN_MULTIPLE)) * HIDDEN_MULTIPLE
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """What is replaced, and no more of a model than makes it an FFN: attention beside it would dilute the figures."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.ffn = SwiGLU(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(self.norm(x))


class PeerBlock(nn.Module):
    """The same with a memory layer that looks its rows up in another way; its search is ours, for the same slots."""

    def __init__(self, case: Case, lookup: Lookup) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(case.width)
        self.p = nn.ParameterDict(layer_parameters(case.setting))
        self.heads, self.top_k = case.heads, case.top_k
        self.lookup = torch.compiler.disable(lookup)

    def forward(self, x: Tensor) -> Tensor:
        p, hidden = self.p, self.norm(x)
        weights, slots = search(hidden, p, self.heads, self.top_k)
        y = self.lookup(slots, weights)
        y = y * F.silu(F.linear(hidden, p["gate_weight"], p["gate_bias"]))
        return x + F.linear(y, p["out_weight"], p["out_bias"])


def search(hidden: Tensor, p: Any, heads: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Weights and slots [tokens, hits] of [tokens, width]."""
    query = F.linear(hidden, p["query_weight"], p["query_bias"]).unflatten(-1, (heads, -1))
    weights, slots = operator("product_key_search")(query, p["half_keys"], top_k)
    return weights.flatten(1), slots.flatten(1)


def filled_table(case: Case) -> nn.Parameter:
    """Values, the same ones for each contestant."""
    values = torch.empty(case.setting.num_slots, case.width)
    cpu.advise_huge_pages(values)
    return nn.Parameter(fill(values))


def fill(values: Tensor) -> Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        fill_table(values)
    return values


def embedding(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """With `F.embedding_bag` in its place the gradient is the same, and takes as long."""
    rows = F.embedding(slots, values, sparse=True)  # [tokens, hits, value_dim]
    return torch.bmm(weights.unsqueeze(1), rows).squeeze(1)


def planned_lookup(pool: MemoryPool, slots: Tensor, weights: Tensor) -> Tensor:
    """What a planned model's memory layers do with their slots."""
    if pool.values_grad == "dense":
        return operator("weighted_gather")(pool.values, slots, weights)
    return operator("table_gather")(pool.values, slots, weights, pool.values_grad)


def _compiled(case: Case, model: nn.Module) -> Layer:
    return torch.compile(model, dynamic=False) if case.compiled else model


def ffn(case: Case) -> Trainee:
    model = Block(case.width)
    return Trainee(_compiled(case, model), (AdamW(model.parameters()),))


def ours(case: Case, values_grad: str, values_optimizer: str | None = None, fused: bool = False) -> Trainee:
    """A planned model and the user's own loop."""
    model = Block(case.width)
    options = {
        "memory_layers": 1,
        "heads": case.heads,
        "top_k": case.top_k,
        "n_keys": case.n_keys,
        "values_grad": values_grad,
        "values_optimizer": values_optimizer,
    }
    trained: Layer = model
    if case.compiled:
        trained = torch.compile(model, backend="memcompile", fullgraph=True, dynamic=False, **options)
    else:
        memcompile.plan(model, **options)
    own = layer_parameters(case.setting)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.split(".")[-1] in own:
                parameter.copy_(own[name.split(".")[-1]])
    fill(model.memory_values)
    pool = pool_of(model)
    assert pool is not None
    return Trainee(trained, (AdamW(model.parameters(), fused=fused),), partial(planned_lookup, pool), pool)


def sparse_adam(case: Case) -> Trainee:
    values = filled_table(case)
    lookup = partial(embedding, values)
    block = PeerBlock(case, lookup)
    return Trainee(_compiled(case, block), (AdamW(block.parameters()), SparseAdam([values])), lookup)


def fbgemm(case: Case) -> Trainee:
    """FBGEMM's CPU operator, which steps the rows in its backward. Of Adam's kind it has none for the CPU."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    bags = SplitTableBatchedEmbeddingBagsCodegen(
        [(case.setting.num_slots, case.width, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=1e-3,
        pooling_mode=PoolingMode.SUM,
        device=torch.device("cpu"),
    )
    fill(bags.split_embedding_weights()[0])

    def lookup(slots: Tensor, weights: Tensor) -> Tensor:
        offsets = torch.arange(0, slots.numel() + 1, slots.shape[1])
        return bags(slots.flatten().long(), offsets, per_sample_weights=weights.flatten())

    block = PeerBlock(case, lookup)
    return Trainee(_compiled(case, block), (AdamW(block.parameters()),), lookup)


TRAINEES: dict[str, Callable[[Case], Trainee]] = {
    cases.FFN: ffn,
    cases.OURS: partial(ours, values_grad="sparse"),
    cases.FUSED: partial(ours, values_grad="fused"),
    cases.LAZY_ADAM: partial(ours, values_grad="sparse", values_optimizer="lazy_adam"),
    cases.ROW_WISE_ADAGRAD: partial(ours, values_grad="sparse", values_optimizer="row_wise_adagrad"),
    cases.ROW_SGD: partial(ours, values_grad="sparse", values_optimizer="row_sgd"),
    cases.DENSE: partial(ours, values_grad="dense", fused=True),
    cases.DENSE_LOOP: partial(ours, values_grad="dense"),
    cases.SPARSE_ADAM: sparse_adam,
    cases.FBGEMM: fbgemm,
}
