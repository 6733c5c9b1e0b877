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
from torch import Tensor, nn

from memcompile.common import token_wise
from memcompile.common.sites import LAYER_NAME
from memcompile.common.token_wise import CASTS, POINTWISE, PROJECTIONS, canonical
from memcompile.errors import CaptureError
from memcompile.runtime.stand_ins.hidden import HiddenActivation
from memcompile.runtime.stand_ins.operations import TRAINED, History, StandIn, State, states_of, unproved

if TYPE_CHECKING:
    from memcompile.runtime.layer import MemoryLayer

# What leaves a replaced parameter as it is.
_KEEPS = token_wise.TRANSPOSES | CASTS | token_wise.RESHAPES
# What a program's own initialisation does. It passes a replaced parameter by: there is nothing to initialise.
_WRITES = frozenset(name for name in dir(Tensor) if name.endswith("_") and not name.startswith("_"))
_WRITES |= frozenset(name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_"))
_IN_PLACE_OPERATORS = frozenset(f"__i{name}__" for name in "add sub mul truediv pow and or".split())
_WRITES |= _IN_PLACE_OPERATORS
# A write that adds a tensor to what was there: a merged adapter, a mask.
_ADDS = frozenset(f"{name}_" for name in POINTWISE - {"masked_fill", "where"})
_ADDS |= _IN_PLACE_OPERATORS | frozenset(
    "addbmm_ addmm_ addmv_ addr_ baddbmm_ index_add_ scatter_add_ scatter_reduce_".split()
)
_PARTS = (token_wise.FEATURE_SPLITS - {"slice"}) | {"__getitem__"}
_IN_PLACE = _IN_PLACE_OPERATORS | frozenset(f"{name}_" for name in token_wise.TOKEN_WISE)
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
    return _dispatch(func.__name__, args, kwargs or {})


class ReplacedParameter(StandIn):
    """Stands where a parameter of a replaced FFN was.

    Attributes:
        name: the parameter's full name.
        role: what it was to the FFN.
        width: features that an up-projection by it produces; 0 for other roles.
        layer: the memory layer that replaced the FFN.
        shape: the parameter's shape, for code that asks.
        state: the name within the FFN, or what led to this part of the parameter or to what was computed of it.
        holder: of a down-projection's weight the module that has it, and the memory layer too.
        cast: the dtype that the model's code cast it to for one call, if it did.
    """

    def __init__(
        self,
        name: str,
        role: Role,
        width: int,
        layer: MemoryLayer,
        shape: torch.Size,
        state: State,
        holder: nn.Module | None = None,
        cast: torch.dtype | None = None,
    ) -> None:
        self.name, self.role, self.width, self.layer, self.shape = name, role, width, layer, shape
        self.state, self.holder, self.cast = state, holder, cast

    def _itself(self, *args: Any, **kwargs: Any) -> ReplacedParameter:
        return self

    def to(self, *args: Any, **kwargs: Any) -> ReplacedParameter:
        for argument in (*args, *kwargs.values()):
            dtype = argument if isinstance(argument, torch.dtype) else getattr(argument, "dtype", None)
            if dtype is not None:
                return ReplacedParameter(
                    self.name, self.role, self.width, self.layer, self.shape, self.state, self.holder, dtype
                )
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
    contiguous = detach = clone = cpu = cuda = _itself
    t = transpose = permute = view = reshape = unsqueeze = squeeze = expand = view_as = flatten = __setitem__ = _itself
    data = property(_itself, lambda self, data: None)
    requires_grad = property(lambda self: False, lambda self, requires_grad: None)
    is_meta = True  # it holds no numbers either: initialisations that read what they have drawn leave it alone
    T = property(_itself)
    mT = property(_itself)  # noqa: N815

    def dim(self) -> int:
        return len(self.shape)

    ndimension = dim

    def is_floating_point(self) -> bool:
        return True

    ndim = property(dim)

    def numel(self) -> int:
        return self.shape.numel()

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def __matmul__(self, other: Any) -> Any:
        raise CaptureError(f"memcompile: {self.name}, which a memory replaced, is multiplied from the left")

    def derived(self, operator: str, operands: Sequence[Any], shape: torch.Size) -> ReplacedParameter:
        """What an operator makes of it: no weight of a projection."""
        state = (operator, *states_of(operands))
        if TRAINED in state:
            raise unproved(self.layer, f"`{operator}` of {self.name}", operands, self.state)
        return ReplacedParameter(self.name, Role.OTHER, 0, self.layer, shape, state, cast=self.cast)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # copy and pickle ask a bare instance for these
            raise AttributeError(attribute)
        if attribute in ("dtype", "device"):
            return (attribute == "dtype" and self.cast) or getattr(self.layer.query_weight, attribute)
        if attribute.startswith("new_"):
            return getattr(torch.empty(0, dtype=self.dtype, device=self.device), attribute)
        raise AttributeError(
            f"{attribute!r} of {self.name}: this parameter was replaced by a memory "
            f"(memcompile.explain(model) lists which, memcompile.replaced_modules(model) the modules that held them); "
            f"exclude its block from memory_layers to keep it"
        )

    def __repr__(self) -> str:
        return f"ReplacedParameter({self.name})"


def _forwarded(spelling: str) -> Callable:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _dispatch(spelling, (self, *args), kwargs)

    method.__name__ = spelling
    return method


def _refused_operator(spelling: str) -> Callable:
    def method(self: HiddenActivation, *args: Any) -> Any:
        raise self.mixes(f"`{spelling}`")

    return method


_METHODS = POINTWISE | CASTS | token_wise.DROPOUTS | token_wise.FEATURE_REDUCTIONS | {"min", "max"}
_METHODS |= {f"{name}_" for name in _METHODS}
_ARITHMETIC = {f"__{side}{name}__" for name in "add sub mul pow truediv".split() for side in ("", "r", "i")}
_ARITHMETIC |= {"__neg__", "__pos__", "__abs__"}
_OTHERS = set("__eq__ __ne__ __lt__ __le__ __gt__ __ge__ __and__ __or__ __invert__ __matmul__".split())
_reached: tuple[tuple[Any, frozenset[str]], ...] = (
    (HiddenActivation, _METHODS | _ARITHMETIC | _OTHERS),
    (ReplacedParameter, POINTWISE | _WRITES | _ARITHMETIC | _PARTS),
)
# Python operators and tensor methods reach a stand-in as attributes, not through __torch_function__.
for _class, _spellings in _reached:
    _class.__torch_function__ = classmethod(_torch_function)
    for _spelling in _spellings:
        if _spelling.startswith("__") or not hasattr(_class, _spelling):
            setattr(_class, _spelling, _forwarded(_spelling))
# Without these Python would have an answer of its own: an object is true.
for _spelling in "bool int float len setitem floordiv mod xor".split():
    setattr(HiddenActivation, f"__{_spelling}__", _refused_operator(f"__{_spelling}__"))


def _dispatch(spelling: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Runs an operator, by the name of its function or method, on arguments of which at least one is a stand-in."""
    name = canonical(spelling)
    given = (*args, *kwargs.values())
    operands = [a for arg in given for a in (arg if isinstance(arg, (list, tuple)) else (arg,))]
    if name in PROJECTIONS:
        return _project(name, operands, args, kwargs)
    hidden = [a for a in operands if isinstance(a, HiddenActivation)]
    if hidden:
        if name in _FACTORIES:
            return _like(name, hidden[0], kwargs)
        in_place = spelling in _IN_PLACE or kwargs.get("inplace") is True
        return hidden[0].run(name, hidden, operands, args, kwargs, in_place)
    replaced = [a for a in operands if isinstance(a, ReplacedParameter)]
    first, others = replaced[0], [a for a in operands if isinstance(a, Tensor)]
    written = kwargs.get("out") is first or (spelling in _WRITES and next(iter(args), kwargs.get("tensor")) is first)
    if written and not (spelling in _ADDS and any(other.dim() > 0 or other.requires_grad for other in others)):
        return first
    if name in _KEEPS and not others:
        return first
    if name in _FACTORIES:
        return _like(name, first, kwargs)
    if spelling in _PARTS and not others:
        return _parts(spelling, first, args[1:], kwargs)
    if name == "add" and len(others) == 1 and _is_down_bias(first, others[0]):
        if first.layer.operations.after((first.state, name)) is None:
            raise unproved(first.layer, f"what was made of {first.name}", (), first.state)
        return others[0]
    if name in POINTWISE and _is_derived(replaced, others):
        return first.derived(name, operands, first.shape)
    raise CaptureError(
        f"memcompile: {first.name} was replaced by a memory, but {spelling} reads it; exclude its block from "
        f"memory_layers to keep the parameter"
    )


def _like(name: str, stand_in: Any, kwargs: dict[str, Any]) -> Tensor:
    return _FACTORIES[name](stand_in.shape, **{"dtype": stand_in.dtype, "device": stand_in.device, **kwargs})


def _parts(spelling: str, parameter: ReplacedParameter, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Parts of a parameter, as an initialisation writes to and as an FFN with one bias for all reads."""
    parts = getattr(torch.empty(parameter.shape, device="meta"), spelling)(*args, **kwargs)
    if isinstance(parts, Tensor):
        return parameter.derived(spelling, (parameter,), parts.shape)
    return tuple(parameter.derived(spelling, (parameter,), part.shape) for part in parts)


def _is_down_bias(parameter: ReplacedParameter, output: Tensor) -> bool:
    """Whether ``output + parameter`` adds a down-projection's bias on its own: no other vector of an FFN is as wide."""
    width = parameter.layer.width
    return parameter.role is Role.OTHER and parameter.shape == (width,) and output.shape[-1] == width


def _is_derived(replaced: Sequence[ReplacedParameter], others: Sequence[Tensor]) -> bool:
    """Whether something is computed of learned vectors and constants, which only the hidden activation reads:
    ``1 + gamma``, ``softplus(alpha)``; or of parameters and numbers alone.
    """
    rank = max(len(parameter.shape) for parameter in replaced)
    return not others or (all(p.role is Role.OTHER for p in replaced) and all(o.dim() <= rank for o in others))


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
        beside = [a for a in operands if a is not activation]
        state = weight.layer.operations.after((weight.state, "projection", *states_of(beside)))
        if state is None:
            raise unproved(weight.layer, f"`projection` by {weight.name}", beside, weight.state)
        return HiddenActivation(activation, (weight.width,), weight.layer, History(state, activation))
    if not isinstance(activation, HiddenActivation) or activation.layer is not weight.layer:
        raise CaptureError(
            f"memcompile: {weight.name} was replaced by a memory, but projects {type(activation).__name__} "
            f"that its own up-projection did not produce; exclude its block from memory_layers"
        )
    return activation.project(running_layer(weight.layer, weight.holder), operands, weight.cast)


def running_layer(layer: Any, holder: nn.Module | None) -> Any:
    """What is registered in a layer's place: PEFT's ``modules_to_save`` puts a wrapper there, which runs a copy."""
    return holder._modules[LAYER_NAME] if isinstance(layer, nn.Module) and holder is not None else layer
