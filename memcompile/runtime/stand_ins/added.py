"""Memory beside an FFN: what runs in the owner's own forward where the memory is added and the FFN stays.

The parameters stay registered where they were, but code that reads a projection's weight from its module meets a
`CarryingWeight`: the module's class gets a property of that name (`_CarryingModule`). The up-projection runs on the
real weight and returns a `CarriedActivation`: the hidden activation, and with it what the up-projection read. Every
operator runs on the activation and carries that source on; the down-projection adds ``layer(source)`` to what it
computes.
"""

from __future__ import annotations

import copyreg
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memcompile.common.token_wise import PROJECTED, PROJECTIONS, RESHAPES, TRANSPOSES, canonical
from memcompile.errors import CaptureError, PlanError
from memcompile.runtime.stand_ins.replaced import Role

if TYPE_CHECKING:
    from memcompile.runtime.layer import MemoryLayer

_CARRYING_WEIGHTS = "_memcompile_weights"  # on a module: attribute -> what stands there
# What code does to a weight on its way into a projection. Not detach or clone: those take a copy to look at.
_OF_A_WEIGHT = RESHAPES | TRANSPOSES | frozenset("T to type type_as float half bfloat16 double contiguous".split())


class _InFrontOfTensor:
    """Passes for the tensor `value`: torch functions, methods, operators and attributes reach the tensor itself."""

    value: Any
    layer: MemoryLayer

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, canonical(func.__name__), args, kwargs or {})

    def __iter__(self) -> Iterator[Any]:
        return iter(_run(torch.unbind, "unbind", (self,), {}))


class CarryingWeight(_InFrontOfTensor):
    """Stands before a projection's weight, wherever that is at the moment of use: FSDP, ``functional_call``,
    ``to()`` and ``load_state_dict(assign=True)`` put other tensors in the place of a parameter.

    Attributes:
        name: the parameter's full name.
        role: whether it projects up or down.
        layer: the memory layer that is added to the FFN.
        module, attribute: where the parameter is registered.
    """

    def __init__(self, name: str, role: Role, layer: MemoryLayer, module: nn.Module, attribute: str) -> None:
        self.name, self.role, self.layer = name, role, layer
        self.module, self.attribute = module, attribute

    @property
    def value(self) -> Any:
        return self.module._parameters[self.attribute]

    def install(self) -> None:
        """Puts itself before the parameter, also before those that are assigned to the attribute later."""
        own_class: Any = type(self.module)
        if not issubclass(own_class, _CarryingModule):
            self.module.__class__ = _carrying(own_class)
        self.module.__dict__.setdefault(_CARRYING_WEIGHTS, {})[self.attribute] = self
        setattr(type(self.module), self.attribute, _carrying_attribute(self.attribute))

    def __getattr__(self, attribute: str) -> Any:
        """What code attached to the parameter."""
        if attribute.startswith("__"):  # copy and pickle ask a bare instance for these
            raise AttributeError(attribute)
        return getattr(self.value, attribute)

    def __repr__(self) -> str:
        return f"CarryingWeight({self.name})"


class _WeightOnItsWay(_InFrontOfTensor):
    """A weight transposed or cast, for one call."""

    def __init__(self, value: Tensor, weight: CarryingWeight | _WeightOnItsWay) -> None:
        self.value = value
        self.name: str = weight.name
        self.role: Role = weight.role
        self.layer = weight.layer


class CarriedActivation(_InFrontOfTensor):
    """The hidden activation of an FFN with memory beside it.

    Attributes:
        value: the activation itself.
        source: what the up-projection read, ``[..., width]``.
        layer: the memory layer that is added to the FFN.
        differentiable: whether the up-projection's result required a gradient.
    """

    def __init__(self, value: Tensor, source: Tensor, layer: MemoryLayer, differentiable: bool) -> None:
        self.value, self.source, self.layer = value, source, layer
        self.differentiable = differentiable

    def error(self, what: str) -> CaptureError:
        return CaptureError(
            f"memcompile: the hidden activation of an FFN to which a memory is added ({self.layer.name}) {what}; "
            f"exclude the block from memory_layers"
        )

    def __repr__(self) -> str:
        return f"CarriedActivation({tuple(self.value.shape)} of {self.layer.name})"


_WEIGHTS = (CarryingWeight, _WeightOnItsWay)


class _CarryingModule(nn.Module):
    """What a module with carrying weights is besides its own class.

    A class of its own, and nothing in ``__dict__``: assigning a parameter takes away what stands there, and Dynamo's
    guards do not ask for it: they would run the graph of a dense block for its like with memory.
    """

    _own_class: type[nn.Module]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Also runs when a parameter is assigned."""
        if name in self.__dict__[_CARRYING_WEIGHTS] and _is_sharded(param) > _is_sharded(self._parameters[name]):
            weight = self.__dict__[_CARRYING_WEIGHTS][name]
            raise PlanError(
                f"{weight.name} becomes a DTensor, which a memory that is added cannot follow: exclude "
                f"{weight.layer.name!r} from tensor parallelism or from memory_layers (fully_shard works)"
            )
        super().register_parameter(name, param)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name the module's own class: this one has no place to be imported from."""
        reduced: Any = super().__reduce_ex__(protocol)
        function, arguments, *state = reduced
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]
            names = tuple(self.__dict__[_CARRYING_WEIGHTS])
            return (_new_carrying, (self._own_class, names, *arguments[1:]), *state)
        return (function, arguments, *state)


@functools.cache
def _carrying(cls: Any) -> type:
    """A new class for modules of class ``cls``."""
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (_CarryingModule, cls), {**names, "_own_class": cls})


def _carrying_attribute(name: str) -> property:
    def get(module: nn.Module) -> Any:
        weight = module.__dict__[_CARRYING_WEIGHTS].get(name)
        # FSDP reads its shards as attributes; they are never what runs.
        if weight is None or _is_sharded(module._parameters[name]):
            return module._parameters[name]
        return weight

    return property(get)


def _is_sharded(parameter: Tensor | None) -> bool:
    return hasattr(parameter, "device_mesh")  # a DTensor, whose import takes a second


def _new_carrying(cls: Any, names: tuple[str, ...], *arguments: Any) -> nn.Module:
    carrying = _carrying(cls)
    for name in names:
        setattr(carrying, name, _carrying_attribute(name))
    module: nn.Module = carrying.__new__(carrying, *arguments)
    return module


def _run(call: Callable, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Runs ``call``, an operator of that name, on the tensors behind its arguments, and hands on what they carry."""
    found: list[_InFrontOfTensor] = []
    result = call(*_behind(args, found), **{key: _behind(value, found) for key, value in kwargs.items()})
    weights = [a for a in found if isinstance(a, _WEIGHTS)]
    carried = [a for a in found if isinstance(a, CarriedActivation)]
    if name in PROJECTIONS and len(weights) + len(carried) > 0:
        return _projected(result, _operand(name, args, kwargs), weights, carried)
    if name in _OF_A_WEIGHT and isinstance(args[0], _WEIGHTS):
        return _WeightOnItsWay(result, args[0])
    if carried:
        return _carry(result, carried)
    return result


def _behind(argument: Any, found: list[_InFrontOfTensor]) -> Any:
    """The tensors behind an argument; what stood before them is added to ``found``."""
    if isinstance(argument, _InFrontOfTensor):
        found.append(argument)
        return argument.value
    if type(argument) in (list, tuple):
        return type(argument)([_behind(item, found) for item in argument])
    return argument


def _carry(result: Any, carried: list[Any]) -> Any:
    first = carried[0]
    for other in carried:
        if other.layer is not first.layer:
            raise first.error(f"meets that of {other.layer.name}")
    if isinstance(result, Tensor):
        return CarriedActivation(result, first.source, first.layer, any(c.differentiable for c in carried))
    if isinstance(result, (list, tuple)) and any(isinstance(item, Tensor) for item in result):
        return type(result)([_carry(item, carried) for item in result])
    return result


def _operand(name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What a projection projects."""
    if name == "einsum":
        operands = args[1] if isinstance(args[1], (list, tuple)) else args[1:]
        return next((a for a in operands if not isinstance(a, _WEIGHTS)), None)
    position, keyword = PROJECTED[name]
    return args[position] if len(args) > position else kwargs.get(keyword)


def _projected(result: Any, operand: Any, weights: list[Any], carried: list[Any]) -> Any:
    if not carried and (len(weights) != 1 or not isinstance(operand, Tensor)):
        return result  # of weights alone, or by something else: a penalty on them, a look at them
    if len(weights) != 1:
        raise carried[0].error("is projected by something else than the FFN's own weight")
    (weight,) = weights
    layer = weight.layer
    if weight.role is Role.UP:
        if carried:
            raise carried[0].error(f"is projected by {weight.name}")
        if operand.shape[-1] != layer.width:
            raise CaptureError(
                f"memcompile: {weight.name} projects {tuple(operand.shape)}, which does not have its {layer.width} "
                f"features last; exclude the block from memory_layers"
            )
        return CarriedActivation(result, operand, layer, result.requires_grad)
    if not isinstance(operand, CarriedActivation) or operand.layer is not layer:
        raise CaptureError(
            f"memcompile: a memory is added to the output of {weight.name}, but it projects "
            f"{type(operand).__name__} that its own up-projection did not produce; exclude its block from memory_layers"
        )
    if operand.differentiable and torch.is_grad_enabled() and not operand.value.requires_grad:
        raise operand.error("lost its gradient between the projections: an autograd.Function takes tensors alone")
    # Some models keep the down-projection in a higher precision (T5): the memory has its dtype.
    memory = layer(operand.source.to(layer.query_weight.dtype))
    return result + memory.reshape(result.shape).to(result.dtype)


def _forwarded(name: str, call: Callable) -> Callable:
    def method(self: _InFrontOfTensor, *args: Any, **kwargs: Any) -> Any:
        return _run(call, canonical(name), (self, *args), kwargs)

    return method


def _forwarded_reversed(name: str, call: Callable) -> Callable:
    def method(self: _InFrontOfTensor, other: Any) -> Any:
        return _run(call, canonical(name), (other, self), {})

    return method


def _method(name: str) -> Callable:
    return lambda tensor, *args, **kwargs: getattr(tensor, name)(*args, **kwargs)


def _attribute(name: str) -> property:
    get = _forwarded(name, lambda tensor: getattr(tensor, name))
    return property(get, lambda self, value: setattr(self.value, name, value))


# Python looks operators, methods and attributes up on the class, without __torch_function__.
for _name in dir(Tensor):
    if not _name.startswith("_") and _name != "name":
        _callable = callable(getattr(Tensor, _name))
        setattr(_InFrontOfTensor, _name, _forwarded(_name, _method(_name)) if _callable else _attribute(_name))
for _name in "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split():
    _operator = getattr(operator, f"__{_name}__")
    setattr(_InFrontOfTensor, f"__{_name}__", _forwarded(f"__{_name}__", _operator))
    setattr(_InFrontOfTensor, f"__r{_name}__", _forwarded_reversed(f"__r{_name}__", _operator))
    setattr(_InFrontOfTensor, f"__i{_name}__", _forwarded(f"__i{_name}__", getattr(operator, f"__i{_name}__")))
for _name in "neg pos abs invert eq ne lt le gt ge getitem setitem".split():
    setattr(_InFrontOfTensor, f"__{_name}__", _forwarded(f"__{_name}__", getattr(operator, f"__{_name}__")))
for _conversion in (bool, int, float, complex, len):
    setattr(_InFrontOfTensor, f"__{_conversion.__name__}__", _forwarded(_conversion.__name__, _conversion))
