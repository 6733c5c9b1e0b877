"""The arguments of `memcompile::memory_lookup`, and what they must be to fit each other."""

import math
from types import SimpleNamespace

import torch
from torch import Tensor

from memcompile.config import MAX_SLOTS
from memcompile.lowering.distributed.sharded_table import Shards
from memcompile.lowering.register.schema import expect
from memcompile.lowering.search.product_key_topk import check_top_k

_CHOICES = {
    "values_grad": ("dense", "sparse"),
    "values_storage": ("device", "host", "mmap"),
    "weighting": ("softmax", "sigmoid"),
}


class LookupArguments(SimpleNamespace):
    """The operator's arguments, by their names in its schema; and which `overload` was called, "" or ".counting"."""

    @property
    def shards(self) -> Shards | None:
        """How the values lie on ranks; None where they are whole."""
        if not self.parts:
            return None
        return Shards(self.group, tuple(self.parts), self.part, self.shard_dim, self.same_tokens)

    @property
    def in_parallel(self) -> bool:
        """Whether this is one rank's part of a layer that is computed in parallel, of the same tokens."""
        return self.same_tokens and len(self.parts) > 1

    def check(self) -> None:
        """Raises ValueError, which names the argument, for arguments that do not fit each other."""
        self._check_options()
        self._check_search()
        self._check_projections(self._check_values())

    def _check_options(self) -> None:
        for name, choices in _CHOICES.items():
            if (given := getattr(self, name)) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {given!r}")
        if self.values_storage != "device" and self.values.requires_grad:
            raise ValueError(
                f"values: those of values_storage={self.values_storage!r} do not learn: values.requires_grad_(False), "
                f"or values_storage='device' to train them"
            )
        if not 0 <= self.balance_loss < math.inf:
            raise ValueError(f"balance_loss: expected a factor >= 0, got {self.balance_loss}")
        if self.num_tables < 1:
            raise ValueError(f"num_tables: expected at least 1, got {self.num_tables}")

    def _check_search(self) -> None:
        x, query_weight, half_keys, heads = self.x, self.query_weight, self.half_keys, self.heads
        if x.dim() < 1:
            raise ValueError("x: expected [..., d], got a scalar")
        if heads < 1:
            raise ValueError(f"heads: expected at least 1, got {heads}")
        if query_weight.dim() != 2 or query_weight.shape[1] != x.shape[-1]:
            raise ValueError(
                f"query_weight: expected [heads * key_dim, d = {x.shape[-1]}], got {list(query_weight.shape)}"
            )
        rows = query_weight.shape[0]
        if rows == 0 or rows % heads != 0:
            raise ValueError(f"query_weight: {rows} rows do not divide into heads = {heads} queries")
        key_dim = rows // heads
        if key_dim % 2 != 0:
            raise ValueError(f"query_weight: key_dim must be even, got {rows} rows / {heads} heads = {key_dim}")
        _expect_shape("query_bias", self.query_bias, (rows,), "[heads * key_dim]")
        if half_keys.dim() != 4:
            raise ValueError(f"half_keys: expected [2, heads, n_keys, key_dim / 2], got {list(half_keys.shape)}")
        shape = 2, heads, half_keys.shape[2], key_dim // 2
        _expect_shape("half_keys", half_keys, shape, "[2, heads, n_keys, key_dim / 2]")
        _expect_shape("temperature", self.temperature, (heads,), "[heads]")
        for name in ("query_scale", "query_shift", "query_mean", "query_var"):
            _expect_shape(name, getattr(self, name), (rows,), "[heads * key_dim]")
            if self.query_scale is None and getattr(self, name) is not None:
                raise ValueError(f"{name}: given without query_scale")
        if (self.query_mean is None) != (self.query_var is None):
            raise ValueError("query_mean and query_var: give both, or neither")
        check_top_k(self.top_k, half_keys.shape[2])
        if (self.slot_hits is None) != (self.key_hits is None):
            raise ValueError("slot_hits and key_hits: give both, or neither")
        if self.training and not self.overload:
            raise ValueError("training: memory_lookup.default moves no statistics, memory_lookup.updating does")
        if self.slot_hits is not None:
            if self.overload != ".counting":
                raise ValueError("slot_hits: hits are counted by memory_lookup.counting alone")
            expect("slot_hits", self.slot_hits, (self.num_tables * half_keys.shape[2] ** 2,), torch.int64)
            expect("key_hits", self.key_hits, (2, heads, half_keys.shape[2]), torch.int64)

    def _check_values(self) -> int:
        """Returns how many columns of v this call has."""
        shards, width, own = self.shards, self.x.shape[-1], self.half_keys.shape[2] ** 2
        shape, slots = list(self.values.shape), self.num_tables * own
        if shards is not None and len(shape) == 2:
            shape[shards.dim] = sum(shards.sizes)
        if len(shape) != 2 or shape[0] != slots:
            rows = "n_keys**2" if self.num_tables == 1 else "num_tables * n_keys**2"
            raise ValueError(f"values: expected [{rows} = {slots}, value_dim], got {shape}")
        if slots > MAX_SLOTS:
            raise ValueError(f"values: {slots} slots do not fit int32")
        if self.first_slot % own or not 0 <= self.first_slot < slots:
            raise ValueError(
                f"first_slot: expected a multiple of n_keys**2 = {own} below {slots}, got {self.first_slot}"
            )
        if self.slot_offset is not None:
            expect("first_slot", self.slot_offset, (), torch.int32)
            if self.first_slot:
                raise ValueError("first_slot: give a number or slot_offset, not both")
        if self.pairs and shape[1] <= width:
            raise ValueError(f"values: expected pairs [{slots}, d + value_dim] with d = {width}, got {shape}")
        if self.pairs and shards is not None and shards.by_columns:
            raise ValueError("shards: a table of pairs is sharded by rows, since a pair is read whole: shard_by='rows'")
        columns = shards.own if shards is not None and shards.same_tokens else shape[1]
        return columns - width if self.pairs else columns

    def _check_projections(self, value_dim: int) -> None:
        for part in ("gate", "out"):
            if getattr(self, f"{part}_weight") is None and getattr(self, f"{part}_bias") is not None:
                raise ValueError(f"{part}_bias: given without {part}_weight")
        _expect_shape("gate_weight", self.gate_weight, (value_dim, self.x.shape[-1]), "[value_dim, d]")
        _expect_shape("gate_bias", self.gate_bias, (value_dim,), "[value_dim]")
        out_weight = self.out_weight
        if out_weight is None:
            return
        if out_weight.dim() != 2 or out_weight.shape[1] != value_dim:
            raise ValueError(f"out_weight: expected [d_out, value_dim = {value_dim}], got {list(out_weight.shape)}")
        _expect_shape("out_bias", self.out_bias, (out_weight.shape[0],), "[d_out]")


def _expect_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...], meaning: str) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name}: expected {meaning} = {list(shape)}, got {list(tensor.shape)}")
