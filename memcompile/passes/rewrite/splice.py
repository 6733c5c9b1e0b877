"""One lookup put into a graph at one call of an FFN, and the FFN's own nodes taken out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from memcompile.common.sites import FfnSite
from memcompile.errors import PlanError
from memcompile.passes._torch import OpOverload
from memcompile.passes.capture.graphs import Scope
from memcompile.passes.detect.region import Region

# What says where in the user's program a node stands; the lookup stands where the down-projection did.
_PROVENANCE = ("nn_module_stack", "stack_trace", "custom", "partitioner_tag")


class Splice:
    """The place of one call of an FFN in its graph.

    Attributes:
        down: the node whose value is the FFN's output, in the shape [..., width].
        inner: the FFN's nodes.
        sources: what the memory may read: the up-projection's operand, and the same activation before views.
    """

    def __init__(self, region: Region, scope: Scope, site: FfnSite) -> None:
        self.graph, self.site = scope.module.graph, site
        original = scope.original
        self.down = original[region.down.node]
        self.inner = {original[node] for node in region.all_nodes if node in original}
        sources = [original[n] for n in (region.up[0].input, region.source)]
        self.sources = [n for n in sources if n.meta["val"].shape[-1] == site.width]

    def insert(
        self, lookup: OpOverload, tensors: Sequence[fx.Node | None], sizes: tuple, options: dict[str, Any]
    ) -> fx.Node:
        """``lookup(source, *tensors, *sizes, **options)`` before the FFN's output, in the shape and dtype of that
        output.
        """
        output = self.down.meta["val"]
        same = [s for s in self.sources if _sizes(s)[:-1] == _sizes(self.down)[:-1]]
        source = (same or self.sources)[0]
        value = source.meta["val"]
        with self.graph.inserting_before(self.down):
            # Projections in the dtype of the tokens, as a graph captured under autocast has the FFN's. The operator
            # casts keys and temperature, and takes values of any dtype.
            query, query_bias, keys, values, *projections, temperature = tensors
            cast = [self._in_dtype(tensor, value.dtype) for tensor in (query, query_bias, *projections)]
            tensors = (*cast[:2], keys, values, *cast[2:], temperature)
            shape = (*value.shape[:-1], self.site.width)
            node = self._call(lookup, (source, *tensors, *sizes), output if same else output.new_empty(shape))
            node.kwargs = options
            if not same:
                node = self._call(torch.ops.aten.view.default, (node, self._output_sizes()), output)
        return node

    def add(self, output: fx.Node) -> None:
        """Adds ``output`` to the FFN's."""
        with self.graph.inserting_after(self.down):
            total = self._call(torch.ops.aten.add.Tensor, (self.down, output), self.down.meta["val"])
        self.down.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)

    def replace(self, output: fx.Node) -> None:
        """Has ``output`` read in the place of the FFN's, and sizes of the source in the place of sizes inside the FFN,
        which others read in graphs of make_fx.
        """
        self.down.replace_all_uses_with(output)
        for node in list(self.graph.nodes):
            size = node.meta.get("val")
            if isinstance(size, torch.SymInt) and node.users and not self.inner.isdisjoint(node.all_input_nodes):
                with self.graph.inserting_before(node):
                    same = self._size(size)
                if same is not None:
                    node.replace_all_uses_with(same)

    def check_erased(self) -> None:
        """Raises PlanError where something else still reads a node of the FFN."""
        for node in self.graph.nodes:
            if node in self.inner:
                readers = ", ".join(sorted(str(user) for user in node.users))
                raise PlanError(
                    f"{self.site.name or self.site.down!r}: {node} is also read by {readers}, outside of it"
                )

    def _call(self, target: Any, args: tuple, value: Tensor) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta = {key: self.down.meta[key] for key in _PROVENANCE if key in self.down.meta} | {"val": value}
        return node

    def _in_dtype(self, tensor: fx.Node | None, dtype: torch.dtype) -> fx.Node | None:
        if tensor is None or tensor.meta["val"].dtype == dtype:
            return tensor
        node = self._call(torch.ops.aten._to_copy.default, (tensor,), tensor.meta["val"].to(dtype))
        node.kwargs = {"dtype": dtype}
        return node

    def _output_sizes(self) -> list[Any]:
        """The FFN's output shape as operands: numbers, sizes of what the memory reads, one -1 for a size of neither."""
        sizes = [self._size(size) for size in self.down.meta["val"].shape]
        if sizes.count(None) > 1:
            raise PlanError(
                f"{self.site.name or self.site.down!r} reshapes its tokens to sizes that its input does not have: "
                f"export with fewer dynamic dimensions"
            )
        return [-1 if size is None else size for size in sizes]

    def _size(self, size: int | torch.SymInt) -> Any:
        if isinstance(size, int):
            return size
        for source in self.sources:
            for dim, expression in enumerate(_sizes(source)):
                if expression == size.node.expr:
                    return self._call(torch.ops.aten.sym_size.int, (source, dim), source.meta["val"].shape[dim])
        return None


def _sizes(node: fx.Node) -> list[Any]:
    """The shape of the node's value; symbolic sizes as expressions, whose comparison records no guard."""
    return [size if isinstance(size, int) else size.node.expr for size in node.meta["val"].shape]
