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
from benchmarks.harness.layers import Block, Layer, fill_table, gated, layer_parameters
from benchmarks.harness.package import Table, advise_huge_pages, operator
from benchmarks.training_step import cases
from benchmarks.training_step.cases import Case

LONG = 10_000  # steps
Lookup = Callable[[Tensor, Tensor], Tensor]  # slots and weights [tokens, hits] -> [tokens, value_dim]


@dataclass(frozen=True)
class Trainee:
    """A model that is trained, and its table alone."""

    model: Layer  # x [tokens, width] -> [tokens, width]
    optimizers: tuple[Optimizer, ...]
    lookup: Lookup | None = None  # None: it has no table
    table: Table | None = None  # of a planned model

    def finish(self) -> None:
        """What follows on a backward."""
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def age(self, touched: int) -> None:
        """Makes the state of the rows that of a long training, of which each step touched so many of them."""
        if self.table is not None:
            self.table.age(self.optimizers[0], LONG, touched, fill_table)


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
        return x + gated(hidden, self.lookup(slots, weights), p)


def search(hidden: Tensor, p: Any, heads: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Weights and slots [tokens, hits] of [tokens, width]."""
    query = F.linear(hidden, p["query_weight"], p["query_bias"]).unflatten(-1, (heads, -1))
    weights, slots = operator("product_key_search")(query, p["half_keys"], top_k)
    return weights.flatten(1), slots.flatten(1)


def filled_table(case: Case) -> nn.Parameter:
    """Values, the same ones for each contestant."""
    values = torch.empty(case.setting.num_slots, case.width)
    advise_huge_pages(values)
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
    table = Table(model)
    fill(table.values)
    return Trainee(trained, (AdamW(model.parameters(), fused=fused),), table.lookup, table)


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
    cases.LAZY_ADAM: partial(ours, values_grad="sparse", values_optimizer="lazy_adam"),
    cases.ROW_WISE_ADAGRAD: partial(ours, values_grad="sparse", values_optimizer="row_wise_adagrad"),
    cases.ROW_SGD: partial(ours, values_grad="sparse", values_optimizer="row_sgd"),
    cases.DENSE: partial(ours, values_grad="dense", fused=True),
    cases.DENSE_LOOP: partial(ours, values_grad="dense"),
    cases.SPARSE_ADAM: sparse_adam,
    cases.FBGEMM: fbgemm,
}
