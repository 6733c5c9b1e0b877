"""Stand-ins: what runs in the owner's own forward where an FFN was replaced, so that no line of it has to change.

Each parameter of the FFN is replaced by a `ReplacedParameter`. The owner's code calls its projection as before;
PyTorch gives the call to the stand-in (`__torch_function__`), and the up-projection returns a `HiddenActivation`
that holds the FFN's input. Token-wise operators return it again. The down-projection turns it into
``layer(input)``: one `memcompile::memory_lookup`. Dynamo traces through all of this and sees that one op.

Parameters are replaced and not modules, because only so is the change exact: a dropout inside a projection module, a
residual inside the FFN, an FFN written with raw parameters and `nn.TransformerEncoderLayer`, whose fused path is not
taken for a weight with `__torch_function__`, all keep their own code.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memcompile.common import token_wise
from memcompile.common.token_wise import CASTS, POINTWISE, PROJECTIONS, canonical
from memcompile.errors import CaptureError
from memcompile.runtime.stand_ins.hidden import HiddenActivation

if TYPE_CHECKING:
    from memcompile.runtime.layer import MemoryLayer

# What leaves a replaced parameter as it is; a loop that initialises every module's weights finds nothing to do.
_KEEPS = token_wise.TRANSPOSES | CASTS | token_wise.RESHAPES
_KEEPS |= frozenset(
    """uniform_ normal_ trunc_normal_ constant_ ones_ zeros_ xavier_uniform_ xavier_normal_ kaiming_uniform_
    kaiming_normal_ orthogonal_""".split()
)
# Random or constant tensors in the shape of a hidden activation: a dropout that the model spells out.
_FACTORIES = {f"{name}_like": getattr(torch, name) for name in ("rand", "randn", "zeros", "ones", "empty")}


class Role(enum.Enum):
    """What a replaced parameter was to its FFN."""

    UP = "up"
    DOWN = "down"
    OTHER = "other"  # biases, inner norms, learned activations: without effect once the weights are gone


def _torch_function(
    cls: type, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
) -> Any:
    return _dispatch(canonical(func.__name__), args, kwargs or {})


class ReplacedParameter:
    """Stands where a parameter of a replaced FFN was.

    Attributes:
        name: the parameter's full name.
        role: what it was to the FFN.
        width: features that an up-projection by it produces; 0 for other roles.
        layer: the memory layer that replaced the FFN.
        shape: the parameter's shape, for code that asks.
        cast: the dtype that the model's code cast it to for one call, if it did.
    """

    def __init__(
        self,
        name: str,
        role: Role,
        width: int,
        layer: MemoryLayer,
        shape: torch.Size,
        cast: torch.dtype | None = None,
    ) -> None:
        self.name, self.role, self.width, self.layer, self.shape, self.cast = name, role, width, layer, shape, cast

    def _itself(self, *args: Any, **kwargs: Any) -> ReplacedParameter:
        return self

    def to(self, *args: Any, **kwargs: Any) -> ReplacedParameter:
        for argument in (*args, *kwargs.values()):
            dtype = argument if isinstance(argument, torch.dtype) else getattr(argument, "dtype", None)
            if dtype is not None:
                return ReplacedParameter(self.name, self.role, self.width, self.layer, self.shape, dtype)
        return self

    def float(self) -> ReplacedParameter:
        return self.to(torch.float32)

    def half(self) -> ReplacedParameter:
        return self.to(torch.float16)

    def bfloat16(self) -> ReplacedParameter:
        return self.to(torch.bfloat16)

    def double(self) -> ReplacedParameter:
        return self.to(torch.float64)

    type = type_as = to
    contiguous = detach = clone = _itself
    uniform_ = normal_ = trunc_normal_ = fill_ = zero_ = copy_ = _itself
    data = property(_itself)
    t = transpose = permute = view = reshape = unsqueeze = squeeze = expand = _itself
    T = property(_itself)
    mT = property(_itself)  # noqa: N815

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __matmul__(self, other: Any) -> Any:
        raise CaptureError(f"memcompile: {self.name}, which a memory replaced, is multiplied from the left")

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # copy and pickle ask a bare instance for these
            raise AttributeError(attribute)
        if attribute in ("dtype", "device"):
            return (attribute == "dtype" and self.cast) or getattr(self.layer.query_weight, attribute)
        raise AttributeError(
            f"{attribute!r} of {self.name}: this parameter was replaced by a memory "
            f"(memcompile.explain(model) lists which); exclude its block from memory_layers to keep it"
        )

    def __repr__(self) -> str:
        return f"ReplacedParameter({self.name})"


def _forward_operator(name: str) -> Callable:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _dispatch(name, (self, *args), kwargs)

    method.__name__ = name
    return method


def _refused_operator(spelling: str) -> Callable:
    def method(self: HiddenActivation, *args: Any) -> Any:
        raise self.mixes(f"`{spelling}`")

    return method


_METHODS = POINTWISE | CASTS | token_wise.DROPOUTS | token_wise.FEATURE_REDUCTIONS | {"min", "max"}
_ARITHMETIC = [f"__{side}{name}__" for name in "add sub mul pow truediv".split() for side in ("", "r", "i")]
_ARITHMETIC += ["__neg__", "__pos__", "__abs__"]
_OTHERS = "__eq__ __ne__ __lt__ __le__ __gt__ __ge__ __and__ __or__ __invert__ __matmul__".split()
_reached: tuple[tuple[Any, frozenset[str], list[str]], ...] = (
    (HiddenActivation, _METHODS, _ARITHMETIC + _OTHERS),
    (ReplacedParameter, POINTWISE, _ARITHMETIC),
)
# Python operators and tensor methods reach a stand-in as attributes, not through __torch_function__.
for _class, _methods, _operators in _reached:
    _class.__torch_function__ = classmethod(_torch_function)
    for _name in sorted(_methods):
        for _spelling in (_name, f"{_name}_"):
            if not hasattr(_class, _spelling):
                setattr(_class, _spelling, _forward_operator(_name))
    for _spelling in _operators:
        setattr(_class, _spelling, _forward_operator(canonical(_spelling)))
# Without these Python would have an answer of its own: an object is true.
for _name in "bool int float len setitem floordiv mod xor".split():
    setattr(HiddenActivation, f"__{_name}__", _refused_operator(f"__{_name}__"))


def _dispatch(name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Runs operator ``name`` on arguments of which at least one is a stand-in."""
    given = (*args, *kwargs.values())
    operands = [a for arg in given for a in (arg if isinstance(arg, (list, tuple)) else (arg,))]
    if name in PROJECTIONS:
        return _project(name, operands, args, kwargs)
    hidden = [a for a in operands if isinstance(a, HiddenActivation)]
    if hidden:
        if name in _FACTORIES:
            like = {"dtype": hidden[0].dtype, "device": hidden[0].device, **kwargs}
            return _FACTORIES[name](hidden[0].shape, **like)
        return hidden[0].run(name, hidden, args, kwargs)
    replaced = [a for a in operands if isinstance(a, ReplacedParameter)]
    others = [a for a in operands if isinstance(a, Tensor)]
    if name in _KEEPS and not others:
        return replaced[0]
    if name == "add" and len(others) == 1 and _is_down_bias(replaced[0], others[0]):
        return others[0]
    if name in POINTWISE and _is_derived(replaced, others):
        return replaced[0]
    raise CaptureError(
        f"memcompile: {replaced[0].name} was replaced by a memory, but {name} reads it; "
        f"exclude its block from memory_layers to keep the parameter"
    )


def _is_down_bias(parameter: ReplacedParameter, output: Tensor) -> bool:
    """Whether ``output + parameter`` adds a down-projection's bias on its own: no other vector of an FFN is as wide."""
    width = parameter.layer.width
    return parameter.role is Role.OTHER and parameter.shape == (width,) and output.shape[-1] == width


def _is_derived(replaced: Sequence[ReplacedParameter], others: Sequence[Tensor]) -> bool:
    """Whether something is computed of learned vectors and constants, which only the hidden activation reads:
    ``1 + gamma``, ``softplus(alpha)``.
    """
    rank = max(len(parameter.shape) for parameter in replaced)
    return all(p.role is Role.OTHER for p in replaced) and all(other.dim() <= rank for other in others)


def projected_operand(name: str, args: tuple, kwargs: dict[str, Any], weight: type) -> Any:
    """What a projection projects: of an einsum's operands the one that is no weight."""
    if name == "einsum":
        operands = args[1] if isinstance(args[1], (list, tuple)) else args[1:]
        return next((a for a in operands if not isinstance(a, weight)), None)
    position, keyword = token_wise.PROJECTED[name]
    return args[position] if len(args) > position else kwargs.get(keyword)


def _project(name: str, operands: Sequence[Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    weights = [a for a in operands if isinstance(a, ReplacedParameter) and a.role is not Role.OTHER]
    activation = projected_operand(name, args, kwargs, ReplacedParameter)
    if len(weights) != 1:
        for stand_in in (activation, *operands):
            if isinstance(stand_in, HiddenActivation):
                raise stand_in.mixes("a projection that was not part of the FFN")
        replaced = [a.name for a in operands if isinstance(a, ReplacedParameter)]
        raise CaptureError(
            f"memcompile: {name} mixes {' and '.join(replaced)}, which a memory replaced, with other operands; "
            f"exclude the block from memory_layers"
        )
    (weight,) = weights
    if weight.role is Role.UP:
        if not isinstance(activation, Tensor):
            raise CaptureError(f"memcompile: {weight.name} projects {activation!r}, which is no tensor")
        return HiddenActivation(activation, (weight.width,), weight.layer)
    if not isinstance(activation, HiddenActivation) or activation.layer is not weight.layer:
        raise CaptureError(
            f"memcompile: {weight.name} was replaced by a memory, but projects {type(activation).__name__} "
            f"that its own up-projection did not produce; exclude its block from memory_layers"
        )
    return activation.project(weight.cast)
