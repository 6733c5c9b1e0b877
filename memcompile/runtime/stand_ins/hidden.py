"""HiddenActivation: what runs in the owner's own forward between the projections of a replaced FFN."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memcompile.common import token_wise
from memcompile.common.token_wise import CASTS, DROPOUTS, FEATURE_JOINS, FEATURE_REDUCTIONS, NORMS, POINTWISE
from memcompile.errors import CaptureError
from memcompile.runtime.stand_ins.feature_shapes import Features, broadcast, indexed, listed, parts, unflattened, viewed
from memcompile.runtime.stand_ins.operations import History, StandIn, State, states_of, unproved

if TYPE_CHECKING:
    from memcompile.runtime.layer import MemoryLayer

# They compute something, or make a tensor of its own: no views. Autograd stops at `detach`.
_COPIES = frozenset({"clone", "detach", "lift_fresh_copy"})
_VIEWS = (CASTS - _COPIES) | token_wise.RESHAPES | token_wise.FEATURE_SPLITS | token_wise.TRANSPOSES
_VIEWS -= {"slice", "t", "movedim", "numpy_T", "mT"}  # which are no methods of its
_SAME_SHAPE = CASTS | DROPOUTS
# What it has of its input. A dropout that the model spells out makes tensors of its dtype and device.
_OF_THE_INPUT = frozenset("dtype device is_cuda requires_grad new_empty new_zeros new_ones new_full".split())
_TAKES_NORM_ORDER = frozenset({"norm", "vector_norm", "linalg_vector_norm"})


class HiddenActivation(StandIn):
    """Stands for the hidden activation of a replaced FFN, and holds the FFN's input ``x [..., d]``.

    It has the shape that the hidden activation would have, ``[..., *features]``, also after operators that treat
    each token alone and that the FFN had when it was planned. Any other operator raises CaptureError.

    Attributes:
        x: what the memory reads, in the shape that views have given it.
        features: sizes of the dimensions that are no tokens.
        layer: the memory layer that replaced the FFN.
        history: what led to it; shared with its views.
    """

    def __init__(self, x: Tensor, features: Features, layer: MemoryLayer, history: History) -> None:
        self.x, self.features, self.layer, self.history = x, features, layer, history

    @property
    def state(self) -> State:  # type: ignore[override]
        return self.history.state

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.x.shape[:-1], *self.features))

    @property
    def ndim(self) -> int:
        return self._leading + len(self.features)

    @property
    def _leading(self) -> int:
        return self.x.ndim - 1

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> Any:
        return self.x.shape[:-1].numel() * math.prod(self.features)

    def is_floating_point(self) -> bool:
        return True

    @property
    def data(self) -> Any:
        raise self.mixes("`.data`")

    @data.setter
    def data(self, data: Any) -> None:  # which Python would keep as an attribute without a meaning
        raise self.mixes("`.data`")

    # --- views ---------------------------------------------------------------------------------------------------

    def view(self, *shape: Any) -> HiddenActivation:
        sizes = listed(shape)
        if isinstance(sizes, torch.dtype):
            raise self.mixes("view(dtype)")
        split = viewed(sizes, self.x.shape[:-1].numel(), self.features)
        if split is None:
            raise self.mixes(f"view{tuple(sizes)}")
        leading, features = split
        return self._with(features, self.x.reshape(*leading, self.x.shape[-1]))

    reshape = _unsafe_view = view

    def view_as(self, other: Any) -> HiddenActivation:
        return self.view(other.shape)

    reshape_as = view_as

    def expand(self, *shape: Any) -> HiddenActivation:
        sizes, tokens = listed(shape), self.x.shape[:-1]
        if len(sizes) != self.ndim or any(new not in (-1, old) for new, old in zip(sizes, tokens, strict=False)):
            raise self.mixes(f"expand{tuple(sizes)}")
        wanted = sizes[self._leading :]
        return self._with(tuple(f if new == -1 else new for new, f in zip(wanted, self.features, strict=True)))

    def expand_as(self, other: Any) -> HiddenActivation:
        return self.expand(other.shape)

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> HiddenActivation:
        start, end = start_dim % self.ndim, end_dim % self.ndim
        if end < self._leading:
            return self._with(self.features, self.x.flatten(start, end))
        first, last = self._feature(start_dim, "flatten"), self._feature(end_dim, "flatten")
        merged = math.prod(self.features[first : last + 1])
        return self._with((*self.features[:first], merged, *self.features[last + 1 :]))

    def unflatten(self, dim: int, sizes: Sequence[int]) -> HiddenActivation:
        if dim % self.ndim < self._leading:
            return self._with(self.features, torch.unflatten(self.x, dim % self.ndim, sizes))
        at = self._feature(dim, "unflatten")
        return self._with((*self.features[:at], *unflattened(self.features[at], sizes), *self.features[at + 1 :]))

    def unsqueeze(self, dim: int) -> HiddenActivation:
        position = dim % (self.ndim + 1)
        if position < self._leading:
            return self._with(self.features, self.x.unsqueeze(position))
        at = position - self._leading
        return self._with((*self.features[:at], 1, *self.features[at:]))

    def squeeze(self, dim: int | None = None) -> HiddenActivation:
        if dim is None:
            raise self.mixes("squeeze of every dimension")
        if dim % self.ndim < self._leading:
            return self._with(self.features, self.x.squeeze(dim % self.ndim))
        at = self._feature(dim, "squeeze")
        return self._with(self.features[:at] + self.features[at + 1 :]) if self.features[at] == 1 else self

    def transpose(self, dim0: int, dim1: int) -> HiddenActivation:
        a, b = self._feature(dim0, "transpose"), self._feature(dim1, "transpose")
        features = list(self.features)
        features[a], features[b] = features[b], features[a]
        return self._with(tuple(features))

    swapaxes = transpose

    def permute(self, *dims: Any) -> HiddenActivation:
        order = [d % self.ndim for d in listed(dims)]
        if order[: self._leading] != list(range(self._leading)):
            raise self.mixes(f"permute{tuple(order)}")
        return self._with(tuple(self.features[d - self._leading] for d in order[self._leading :]))

    @property
    def mT(self) -> HiddenActivation:  # noqa: N802
        return self.transpose(-1, -2)

    # --- parts of the features -----------------------------------------------------------------------------------

    def chunk(self, chunks: int, dim: int = 0) -> tuple[HiddenActivation, ...]:
        return self.split(-(-self.features[self._feature(dim, "chunk")] // chunks), dim)

    def tensor_split(self, sections: int, dim: int = 0) -> tuple[HiddenActivation, ...]:
        size = self.features[self._feature(dim, "tensor_split")]
        if not isinstance(sections, int) or size % sections:
            raise self.mixes(f"tensor_split({sections})")
        return self.split(size // sections, dim)

    def split(self, split_size: int | Sequence[int], dim: int = 0) -> tuple[HiddenActivation, ...]:
        at = self._feature(dim, "split")
        sizes = parts(self.features[at], split_size)
        return tuple(self._with((*self.features[:at], size, *self.features[at + 1 :])) for size in sizes)

    split_with_sizes = split

    def narrow(self, dim: int, start: int, length: int) -> HiddenActivation:
        at = self._feature(dim, "narrow")
        return self._with((*self.features[:at], length, *self.features[at + 1 :]))

    def select(self, dim: int, index: int) -> HiddenActivation:
        at = self._feature(dim, "select")
        return self._with(self.features[:at] + self.features[at + 1 :])

    def unbind(self, dim: int = 0) -> tuple[HiddenActivation, ...]:
        at = self._feature(dim, "unbind")
        return tuple(self.select(dim, index) for index in range(self.features[at]))

    def __getitem__(self, index: Any) -> HiddenActivation:
        features = indexed(index, self._leading, self.features)
        if features is None:
            raise self.mixes(f"indexing by {index!r}")
        return self._with(features)

    # --- operators -----------------------------------------------------------------------------------------------

    def project(
        self, memory: Callable[[Tensor], Tensor], operands: Sequence[Any], cast: torch.dtype | None = None
    ) -> Tensor:
        """The end of the FFN: one lookup with the input, in the shape that the down-projection sees. The memory has the
        dtype of that projection's weight, and so has the result, or that to which the model's code ``cast`` the weight.

        Args:
            memory: the layer that runs.
            operands: of the down-projection.
        """
        x, ones, dtype = self.x, self.features[:-1], self.layer.query_weight.dtype
        if any(size != 1 for size in ones):
            raise self.mixes(f"a down-projection of features {self.features}")
        self._after(("projection", *states_of(operands), self.features[-1]), operands)
        x = x.reshape(*x.shape[:-1], *ones, x.shape[-1]) if ones else x
        if (x.dtype == dtype and cast in (None, dtype)) or torch.is_autocast_enabled(x.device.type):
            return memory(x)
        return memory(x.to(dtype)).to(cast or dtype)

    def run(
        self,
        name: str,
        others: Sequence[HiddenActivation],
        operands: Sequence[Any],
        args: tuple,
        kwargs: dict[str, Any],
        in_place: bool,
    ) -> Any:
        """The result of operator ``name``, whose first hidden operand this is.

        Args:
            others: its hidden operands.
            operands: all of them.
            in_place: whether it writes to its first argument.
        """
        if name in _VIEWS:
            return self if name in _SAME_SHAPE else getattr(self, name)(*args[1:], **kwargs)
        features, history = self._features_after(name, others, args, kwargs), self.history
        if features is None or "out" in kwargs or (in_place and next(iter(args), self) is not self):
            raise self.mixes(name)
        key = (name, history.state) if len(operands) == 1 else (name, *states_of(operands))
        for other in others:
            if other.layer is not self.layer:
                raise self.mixes(f"{name} with the hidden activation of another FFN")
        own = key
        if len(others) > 1 and not all(self._reads_the_same(other) for other in others):
            key = (*own, "of another source")
        if name in DROPOUTS:
            if not self.layer.operations.allows((history.state, *key)) and _is_active(args, kwargs):
                raise self._unproved(name, operands)
            return self
        state = self._after(key, operands)
        if key is not own and self.layer.operations.records:
            without = (history.state, *own)
            self.layer.operations.steps[without] = state  # its input may need no cast another time
        if in_place:
            history.state = state
            return self
        return HiddenActivation(self.x, features, self.layer, History(state, history.source))

    def _reads_the_same(self, other: HiddenActivation) -> bool:
        """Whether the up-projections of both read one tensor. An adapter may change what one of two reads; a cast, or a
        backward hook of a module, makes another tensor of the same numbers.
        """
        source, others = self.history.source, other.history.source
        if source is others or torch.compiler.is_compiling() or self.layer.operations.records:
            return source is others
        return source.dtype == others.dtype and torch.equal(source, others)

    def _after(self, key: tuple[Any, ...], operands: Sequence[Any]) -> State:
        """The state after an operation, which has to be one that the FFN had when it was planned."""
        state = self.layer.operations.after((self.history.state, *key))
        if state is None:
            raise self._unproved(key[0], operands)
        return state

    def _unproved(self, name: str, operands: Sequence[Any]) -> CaptureError:
        return unproved(self.layer, f"`{name}` of {self.features[-1]} features", operands, self.history.state)

    def _features_after(
        self, name: str, others: Sequence[HiddenActivation], args: tuple, kwargs: dict[str, Any]
    ) -> Features | None:
        """The features of an operator's result; None where it is not token-wise."""
        if name in _SAME_SHAPE or (name in POINTWISE and len(others) == 1):
            return self.features
        second = args[1] if len(args) > 1 else None
        # A minimum is of two operands, or along a dimension.
        is_elementwise = isinstance(kwargs.get("other", second), (Tensor, HiddenActivation))
        if name in POINTWISE or (name in ("min", "max") and is_elementwise):
            return broadcast([other.features for other in others])
        if name == "glu":
            return self.chunk(2, kwargs.get("dim", -1 if second is None else second))[0].features
        if name in NORMS:
            shape = kwargs.get("normalized_shape", second) or ()
            return self.features if len(shape) <= len(self.features) else None
        if name in FEATURE_REDUCTIONS:
            return self._reduced(name, args, kwargs)
        if name in FEATURE_JOINS:
            return self._joined(name, others, kwargs.get("dim", second or 0))
        return None

    def _reduced(self, name: str, args: tuple, kwargs: dict[str, Any]) -> Features | None:
        at = 2 if name in _TAKES_NORM_ORDER else 1
        dims = kwargs.get("dim", args[at] if len(args) > at else None)
        at += 2 if name in ("var", "std") else 1  # after `unbiased`
        kept = kwargs.get("keepdim", args[at] if len(args) > at else False)
        if dims is None:
            return None
        reduced = [self._feature(dim, name) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])]
        return tuple([1 if i in reduced else size for i, size in enumerate(self.features) if kept or i not in reduced])

    def _joined(self, name: str, others: Sequence[HiddenActivation], dim: int) -> Features | None:
        if name == "stack":
            others = [other.unsqueeze(dim) for other in others]
        at = others[0]._feature(dim, name)
        features = list(others[0].features)
        features[at] = sum(other.features[at] for other in others)
        return tuple(features)

    def _with(self, features: Features, x: Tensor | None = None) -> HiddenActivation:
        """A view."""
        return HiddenActivation(self.x if x is None else x, features, self.layer, self.history)

    def _feature(self, dim: int, name: str) -> int:
        """Which of the feature dimensions ``dim`` is."""
        at = dim % self.ndim - self._leading
        if at < 0:
            raise self.mixes(f"{name} over tokens")
        return at

    def mixes(self, what: str) -> CaptureError:
        """The error for what is not token-wise."""
        return CaptureError(
            f"memcompile: {what} reached the hidden activation of an FFN that a memory replaced "
            f"({self.layer.name}), and only token-wise operators may stand there; exclude the block from "
            f"memory_layers, or use placement='add', which keeps the FFN"
        )

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # copy and pickle ask a bare instance for these
            raise AttributeError(attribute)
        if attribute in _OF_THE_INPUT:
            return getattr(self.x, attribute)
        raise self.mixes(f"`.{attribute}`")

    def __repr__(self) -> str:
        return f"HiddenActivation({tuple(self.shape)} of {self.layer.name})"


def _is_active(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a dropout drops anything."""
    probability = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    return bool(training) and probability != 0
