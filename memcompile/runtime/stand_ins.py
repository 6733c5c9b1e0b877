"""Stand-ins: what runs in the owner's own forward where an FFN was replaced, so that no line of it has to change.

Each parameter of the FFN is replaced by a `ReplacedParameter`. The owner's code calls its projection as ever;
PyTorch hands the call to the stand-in (`__torch_function__`), and the up-projection returns a `HiddenActivation`
that carries the FFN's input. Token-wise operators pass it on. The down-projection turns it into
``layer(input)``: one `memcompile::memory_lookup`. Dynamo traces through all of this and sees that one op.

The change sits on parameters, not on modules, because only so it is exact: a dropout inside a projection
module, a residual inside the FFN, an FFN written with raw parameters and `nn.TransformerEncoderLayer` with its
fused path, which stands back from any weight that has `__torch_function__`, all keep their own code.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memcompile.errors import CaptureError
from memcompile.token_wise import (
    ACTIVATIONS,
    ARITHMETIC,
    CASTS,
    DROPOUTS,
    FEATURE_REDUCTIONS,
    NORMS,
    PROJECTIONS,
    canonical,
)

if TYPE_CHECKING:
    from memcompile.runtime.layer import MemoryLayer

_PASSED_ON = ACTIVATIONS | ARITHMETIC | CASTS | DROPOUTS | NORMS
# Where an operator takes the dimension it works along, and what it takes without one.
_DIMENSION: dict[str, tuple[int, int | None]] = {
    name: (2 if "norm" in name else 1, None) for name in FEATURE_REDUCTIONS
}
_DIMENSION["glu"] = (1, -1)
_OPERAND = {"linear": 0, "addmm": 1, "matmul": 0, "mm": 0}  # which argument a projection projects


_INITIALISERS = frozenset(
    f"{name}_"
    for name in (
        "uniform normal trunc_normal constant ones zeros xavier_uniform xavier_normal kaiming_uniform kaiming_normal "
        "orthogonal"
    ).split()
)


class Role(enum.Enum):
    """What a replaced parameter was to its FFN."""

    UP = "up"
    DOWN = "down"
    OTHER = "other"  # biases, inner norms, learned activations: without effect once the weights are gone


class _StandIn:
    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _dispatch(canonical(func.__name__), args, kwargs or {})


class ReplacedParameter(_StandIn):
    """Stands where a parameter of a replaced FFN was.

    Attributes:
        name: the parameter's full name.
        role: what it was to the FFN.
        width: features that an up-projection by it produces; 0 for other roles.
        layer: the memory layer that replaced the FFN.
        shape: the parameter's shape, for code that asks.
    """

    def __init__(self, name: str, role: Role, width: int, layer: MemoryLayer, shape: torch.Size) -> None:
        self.name, self.role, self.width, self.layer, self.shape = name, role, width, layer, shape

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.query_weight.dtype

    @property
    def device(self) -> torch.device:
        return self.layer.query_weight.device

    def _itself(self, *args: Any, **kwargs: Any) -> ReplacedParameter:
        return self

    to = type = type_as = float = half = bfloat16 = double = contiguous = detach = _itself
    uniform_ = normal_ = trunc_normal_ = fill_ = zero_ = copy_ = _itself
    data = property(_itself)
    t = transpose = permute = view = reshape = unsqueeze = squeeze = _itself
    T = property(_itself)
    mT = property(_itself)  # noqa: N815

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __matmul__(self, other: Any) -> Any:
        raise CaptureError(f"memcompile: {self.name}, which a memory replaced, is multiplied from the left")

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # copy and pickle ask a bare instance for these
            raise AttributeError(attribute)
        raise AttributeError(
            f"{attribute!r} of {self.name}: this parameter was replaced by a memory "
            f"(memcompile.explain(model) lists which); exclude its block from memory_layers to keep it"
        )

    def __repr__(self) -> str:
        return f"ReplacedParameter({self.name})"


class HiddenActivation(_StandIn):
    """Stands for the hidden activation of a replaced FFN; carries the FFN's input ``x [..., d]`` to its end.

    It has the shape that the hidden activation would have, ``[..., hidden]``, and follows reshapes of the leading
    dimensions. Anything that is not token-wise raises CaptureError.
    """

    def __init__(self, x: Tensor, hidden: int, layer: MemoryLayer) -> None:
        self.x, self.hidden, self.layer = x, hidden, layer

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.x.shape[:-1], self.hidden))

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def ndim(self) -> int:
        return self.x.ndim

    def dim(self) -> int:
        return self.x.dim()

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    @property
    def is_cuda(self) -> bool:
        return self.x.is_cuda

    @property
    def requires_grad(self) -> bool:
        return self.x.requires_grad

    def is_floating_point(self) -> bool:
        return True

    def view(self, *shape: Any) -> HiddenActivation:
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if isinstance(sizes, torch.dtype):
            raise self._mixes("view(dtype)")
        if sizes[-1] not in (-1, self.hidden):
            raise self._mixes(f"view{tuple(sizes)}")
        if sizes[-1] == -1 and math.prod(sizes[:-1]) != self.x.shape[:-1].numel():
            raise self._mixes(f"view{tuple(sizes)}")
        return HiddenActivation(self.x.reshape(*sizes[:-1], self.x.shape[-1]), self.hidden, self.layer)

    reshape = _unsafe_view = view

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> HiddenActivation:
        if end_dim in (-1, self.ndim - 1):
            raise self._mixes("flatten over features")
        return HiddenActivation(self.x.flatten(start_dim, end_dim), self.hidden, self.layer)

    def unsqueeze(self, dim: int) -> HiddenActivation:
        if dim in (-1, self.ndim):
            raise self._mixes("unsqueeze behind the features")
        return HiddenActivation(self.x.unsqueeze(dim), self.hidden, self.layer)

    def chunk(self, chunks: int, dim: int = 0) -> tuple[HiddenActivation, ...]:
        return self.split(-(-self.hidden // chunks), dim)

    def tensor_split(self, sections: int, dim: int = 0) -> tuple[HiddenActivation, ...]:
        if not isinstance(sections, int) or self.hidden % sections:
            raise self._mixes(f"tensor_split({sections})")
        return self.split(self.hidden // sections, dim)

    def narrow(self, dim: int, start: int, length: int) -> HiddenActivation:
        if dim not in (-1, self.ndim - 1):
            raise self._mixes("narrow over tokens")
        return HiddenActivation(self.x, length, self.layer)

    def split(self, split_size: int | Sequence[int], dim: int = 0) -> tuple[HiddenActivation, ...]:
        if dim not in (-1, self.ndim - 1):
            raise self._mixes("a split over tokens")
        if isinstance(split_size, int):
            whole, rest = divmod(self.hidden, split_size)
            split_size = [split_size] * whole + [rest] * (rest > 0)
        return tuple(HiddenActivation(self.x, part, self.layer) for part in split_size)

    def __getitem__(self, index: Any) -> HiddenActivation:
        """``h[..., :n]`` or ``h[:, :, :n]``: a part of the features."""
        if isinstance(index, tuple) and isinstance(index[-1], slice):
            leading = index[:-1]
            whole = leading == (Ellipsis,) or (len(index) == self.ndim and all(i == slice(None) for i in leading))
            if whole:
                return HiddenActivation(self.x, len(range(*index[-1].indices(self.hidden))), self.layer)
        raise self._mixes(f"indexing by {index!r}")

    def _mixes(self, what: str) -> CaptureError:
        return CaptureError(
            f"memcompile: {what} reached the hidden activation of an FFN that a memory replaced "
            f"({self.layer.name}), and only token-wise operators may stand there; exclude the block from memory_layers"
        )

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        raise self._mixes(f"`.{attribute}`")

    def __repr__(self) -> str:
        return f"HiddenActivation({tuple(self.shape)} of {self.layer.name})"


def _forward_operator(name: str) -> Callable:
    def method(self: _StandIn, *args: Any, **kwargs: Any) -> Any:
        return _dispatch(name, (self, *args), kwargs)

    method.__name__ = name
    return method


# Python operators and tensor methods reach a stand-in as attributes, not through __torch_function__.
for _name in sorted(_PASSED_ON | FEATURE_REDUCTIONS):
    for _spelling in (_name, f"{_name}_"):
        if not hasattr(HiddenActivation, _spelling):
            setattr(HiddenActivation, _spelling, _forward_operator(_name))
for _name in ("add", "sub", "mul", "pow", "truediv"):
    for _spelling in (f"__{_name}__", f"__r{_name}__", f"__i{_name}__"):
        setattr(HiddenActivation, _spelling, _forward_operator(canonical(f"__{_name}__")))
for _spelling in ("__neg__", "__abs__", "__matmul__"):
    setattr(HiddenActivation, _spelling, _forward_operator(canonical(_spelling)))


def _refused_operator(spelling: str) -> Callable:
    def method(self: HiddenActivation, *args: Any) -> Any:
        raise self._mixes(f"`{spelling}`")

    return method


# Without these Python would answer itself: an object is true, and equals no number.
for _name in "eq ne lt le gt ge bool int float len setitem floordiv mod and or xor invert".split():
    setattr(HiddenActivation, f"__{_name}__", _refused_operator(f"__{_name}__"))


def _dispatch(name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Runs operator ``name`` on arguments of which at least one is a stand-in."""
    given = (*args, *kwargs.values())
    operands = [a for arg in given for a in (arg if isinstance(arg, (list, tuple)) else (arg,))]
    if name in PROJECTIONS:
        return _project(name, args, kwargs)
    hidden = [a for a in operands if isinstance(a, HiddenActivation)]
    if hidden:
        return _pass_on(name, hidden, args, kwargs)
    replaced = [a for a in operands if isinstance(a, ReplacedParameter)]
    others = [a for a in operands if isinstance(a, Tensor)]
    if name in _INITIALISERS and not others:  # a loop that initialises every module's weights finds nothing to do
        return replaced[0]
    if name == "add" and len(others) == 1 and _is_down_bias(replaced[0], others[0]):
        return others[0]
    raise CaptureError(
        f"memcompile: {replaced[0].name} was replaced by a memory, but {name} reads it; "
        f"exclude its block from memory_layers to keep the parameter"
    )


def _is_down_bias(parameter: ReplacedParameter, output: Tensor) -> bool:
    """Whether ``output + parameter`` adds a down-projection's bias on its own: no other vector of an FFN is as wide."""
    width = parameter.layer.width
    return parameter.role is Role.OTHER and parameter.shape == (width,) and output.shape[-1] == width


def _project(name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    weights = [a for a in (*args, *kwargs.values()) if isinstance(a, ReplacedParameter) and a.role is not Role.OTHER]
    activation = args[_OPERAND[name]] if len(args) > _OPERAND[name] else kwargs.get("input")
    if len(weights) != 1:
        for stand_in in (activation, *args, *kwargs.values()):
            if isinstance(stand_in, HiddenActivation):
                raise stand_in._mixes("a projection that was not part of the FFN")
        replaced = [a.name for a in (*args, *kwargs.values()) if isinstance(a, ReplacedParameter)]
        raise CaptureError(
            f"memcompile: {name} mixes {' and '.join(replaced)}, which a memory replaced, with other operands; "
            f"exclude the block from memory_layers"
        )
    (weight,) = weights
    if weight.role is Role.UP:
        if not isinstance(activation, Tensor):
            raise CaptureError(f"memcompile: {weight.name} projects {activation!r}, which is no tensor")
        return HiddenActivation(activation, weight.width, weight.layer)
    if not isinstance(activation, HiddenActivation) or activation.layer is not weight.layer:
        raise CaptureError(
            f"memcompile: {weight.name} was replaced by a memory, but projects {type(activation).__name__} "
            f"that its own up-projection did not produce; exclude its block from memory_layers"
        )
    return weight.layer(activation.x)


def _pass_on(name: str, hidden: list[HiddenActivation], args: tuple, kwargs: dict[str, Any]) -> Any:
    first = hidden[0]
    if any(other.layer is not first.layer for other in hidden):
        raise first._mixes(f"{name} with the hidden activation of another FFN")
    if name in _DIMENSION:
        position, absent = _DIMENSION[name]
        dim = kwargs.get("dim", args[position] if len(args) > position else absent)
        if dim not in (-1, first.ndim - 1, [-1], [first.ndim - 1], (-1,), (first.ndim - 1,)):
            raise first._mixes(f"{name} over dimension {dim}")
    if name in FEATURE_REDUCTIONS:
        return HiddenActivation(first.x, 1, first.layer)
    if name in NORMS and len(kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())) != 1:
        raise first._mixes(f"{name} over tokens")
    if name in ("chunk", "split", "tensor_split", "narrow", "flatten", "reshape", "unsqueeze"):
        return getattr(first, name)(*args[1:], **kwargs)
    if name == "glu":
        return HiddenActivation(first.x, first.hidden // 2, first.layer)
    if name not in _PASSED_ON:
        raise first._mixes(name)
    return HiddenActivation(first.x, max([h.hidden for h in hidden]), first.layer)
