"""Which group of which optimizer a new parameter of a memory joins, where the optimizers were built before the plan.

Each new parameter gets a neighbour: a parameter of the model that an optimizer holds. It joins the neighbour's group.

- A layer's parameters follow the FFN that it replaces or is added to: matrices its first matrix, vectors its first
  vector. An FFN without vectors follows its block, whose vectors may have a group of their own.
- The table follows the first layer in execution order whose FFN an optimizer holds. The gradient of the table is
  complete when the backward of that layer is.
- A group that is for matrices alone, as Muon's, takes no table, no half-keys and no vectors: they go where the model's
  embeddings and vectors are.
- Without a neighbour a parameter joins no optimizer.
"""

import collections
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from memcompile.runtime.optimizer_state import optimizers_inside, parameters_of


@dataclasses.dataclass(eq=False)
class Group:
    """A group of an optimizer.

    Attributes:
        group: with its parameters and options.
        optimizers: that hold it: one, and those that wrap that one and show the same group.
    """

    group: dict[str, Any]
    optimizers: list[Optimizer]

    @property
    def params(self) -> list[Tensor]:
        """Its parameters, in their order."""
        return self.group["params"]  # type: ignore[no-any-return]

    @property
    def optimizer(self) -> Optimizer:
        """The one that steps it: no wrapper."""
        inner = {id(inside) for optimizer in self.optimizers for inside in optimizers_inside(optimizer)}
        return next((o for o in self.optimizers if id(o) in inner), self.optimizers[0])

    @functools.cached_property
    def has_matrices_alone(self) -> bool:
        """When it was found."""
        return _are_matrices(self.params)

    @property
    def number(self) -> int:
        """Its index in the optimizer."""
        return [id(group["params"]) for group in self.optimizer.param_groups].index(id(self.params))


def groups_of(optimizers: Iterable[Optimizer]) -> list[Group]:
    """The groups of these optimizers, each once."""
    found: dict[int, Group] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            found.setdefault(id(group["params"]), Group(group, [])).optimizers.append(optimizer)
    return list(found.values())


class Neighbours:
    """Which parameters of a model its optimizers hold, and which of them is the neighbour of a new one.

    Args:
        optimizers: those of the model.
        names: of the model's parameters, and of those that a memory replaced, by their id.
        embeddings: the ids of the model's embeddings.
    """

    def __init__(self, optimizers: Iterable[Optimizer], names: Mapping[int, str], embeddings: Iterable[int]) -> None:
        self.groups = groups_of(optimizers)
        self._embeddings = frozenset(embeddings)
        self.names = names
        self._of: dict[int, list[Group]] = collections.defaultdict(list)
        held = {}
        for group in self.groups:
            for parameter in group.params:
                if id(parameter) in names:
                    held[id(parameter)] = parameter
                    self._of[id(parameter)].append(group)
        self._held = [held[key] for key in names if key in held]  # in the model's order

    @property
    def for_matrices(self) -> list[str]:
        """The classes of the optimizers that have groups for matrices alone."""
        groups = {id(g): g for p in self._held for g in self._of[id(p)] if self._is_for_matrices(g, p)}
        return sorted({type(group.optimizer).__name__ for group in groups.values()})

    def groups_with(self, parameter: Tensor) -> list[Group]:
        """The groups that hold a parameter: one, or one of each optimizer that was given it."""
        return self._of.get(id(parameter), [])

    def of_layer(self, parameter: Tensor, ffn: Iterable[nn.Parameter], block: str) -> Tensor | None:
        """The neighbour of a layer's parameter.

        Args:
            ffn: the parameters of the layer's FFN.
            block: the path of the block that the FFN is in.
        """
        matrix, vector = self._first(ffn, lambda dim: dim > 1), self._first(ffn, lambda dim: dim <= 1)
        if parameter.dim() <= 1 and vector is None and matrix is not None:
            return self._vector_beside(matrix, block)
        if parameter.dim() <= 1 or matrix is None:
            return vector
        if not self._takes_matrices_alone(matrix):
            return matrix
        return self._of_shape(matrix, parameter, block) if parameter.dim() == 2 else self._elsewhere(block)

    def of_table(self, ffns: Iterable[tuple[Iterable[nn.Parameter], str]]) -> Tensor | None:
        """The neighbour of the table, of the FFNs and blocks of all layers, in execution order."""
        for ffn, block in ffns:
            ffn = list(ffn)
            first = self._first(ffn, lambda dim: dim > 1)
            if first is None:
                first = self._first(ffn, lambda dim: dim <= 1)
            if first is not None:
                return self._elsewhere(block, for_table=True) if self._takes_matrices_alone(first) else first
        return None

    def _first(self, parameters: Iterable[nn.Parameter], fits: Callable[[int], bool]) -> Tensor | None:
        return next((p for p in parameters if id(p) in self._of and fits(p.dim())), None)

    def _vector_beside(self, matrix: Tensor, block: str) -> Tensor | None:
        """The neighbour of a vector whose FFN has matrices alone: a vector in the matrices' group, else in the block,
        else in the matrices' optimizer.
        """
        vectors = [p for p in self._held if p.dim() <= 1]
        own = self._of[id(matrix)]
        optimizers = {id(optimizer) for group in own for optimizer in group.optimizers}
        together = [p for p in vectors if any(group in own for group in self._of[id(p)])]
        in_block = [p for p in vectors if block and self.names[id(p)].startswith(f"{block}.")]
        alike = [p for p in vectors if any(id(o) in optimizers for g in self._of[id(p)] for o in g.optimizers)]
        for some in (together, in_block, alike):
            if some:
                return self._nearest(some, block)
        return self._elsewhere(block) if self._takes_matrices_alone(matrix) else matrix

    def _elsewhere(self, block: str, for_table: bool = False) -> Tensor | None:
        """The neighbour of what a group for matrices alone does not take: an embedding, for the table; a vector that is
        near, for others; else what there is.
        """
        others = [p for p in self._held if not self._takes_matrices_alone(p)]
        if for_table:
            ranks = [(id(p) not in self._embeddings, p.dim() != 2) for p in others]
        else:
            ranks = [(p.dim() > 1, False) for p in others]
        best = [p for p, rank in zip(others, ranks, strict=True) if rank == min(ranks)]
        return self._nearest(best, block) if best else None

    def _nearest(self, parameters: list[Tensor], block: str) -> Tensor:
        """The one whose name shares most with a block's; of several the first."""

        def shared(parameter: Tensor) -> int:
            pairs = zip(self.names[id(parameter)].split("."), block.split("."), strict=False)
            return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

        return max(parameters, key=shared)

    def _of_shape(self, matrix: Tensor, parameter: Tensor, block: str) -> Tensor | None:
        """The neighbour of a matrix in an optimizer for matrices. Some stack the matrices of a group, which are of one
        shape then.
        """
        (first, *_) = self._of[id(matrix)]
        groups = [g for g in groups_of([first.optimizer]) if g.has_matrices_alone]
        shapes = [{p.shape for p in group.params} for group in groups]
        if len(groups) < 2 or any(len(some) > 1 for some in shapes) or len({*map(str, shapes)}) < 2:
            return matrix
        alike = [p for group in groups for p in group.params if p.shape == parameter.shape and id(p) in self._of]
        return alike[0] if alike else self._elsewhere(block)

    def _takes_matrices_alone(self, parameter: Tensor) -> bool:
        return any(self._is_for_matrices(group, parameter) for group in self._of[id(parameter)])

    def _is_for_matrices(self, group: Group, parameter: Tensor) -> bool:
        """Whether the rule by which an optimizer steps this parameter is for matrices alone."""
        for optimizer in group.optimizers:
            said = _says_muon(optimizer.state.get(parameter, {}))
            if said is not None:  # each parameter has its rule, as in Moonlight's Muon
                return said
        if not group.has_matrices_alone:
            return False
        said = _says_muon(group.group)
        if said is not None:
            return said
        if any(_says_muon(other) for optimizer in group.optimizers for other in optimizer.param_groups):
            return False  # other groups of it are
        if any("muon" in type(optimizer).__name__.lower() for optimizer in group.optimizers):
            return True
        if any(map(_is_known, group.optimizers)):
            return False
        # An optimizer of the user's own that has all of its groups for matrices, where another has the vectors.
        mine = [p for optimizer in group.optimizers for p in parameters_of(optimizer)]
        return _are_matrices(mine) and any(p.dim() < 2 for p in self._held)


def _are_matrices(parameters: Iterable[Tensor]) -> bool:
    return all(p.dim() >= 2 for p in parameters)


def _is_known(optimizer: Optimizer) -> bool:
    """Whether the step of an optimizer is one of PyTorch's or ours, which take tensors of any shape, but for Muon's."""
    return inspect.unwrap(type(optimizer).step).__module__.startswith(("torch.optim.", "memcompile."))


def _says_muon(options: Mapping[str, Any]) -> bool | None:
    """What a group says in an option: `use_muon=False`, `kind="muon"`; None where it says nothing."""
    for name, value in options.items():
        if isinstance(value, bool) and "muon" in name.lower():
            return value
    if options.get("use_fallback") is True:  # timm's
        return False
    said = any(isinstance(value, str) and "muon" in value.lower() for value in options.values())
    return True if said else None
