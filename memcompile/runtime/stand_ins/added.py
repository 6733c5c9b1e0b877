"""Proxies: what runs in the owner's own forward where the memory is added to an FFN.

The parameters stay registered where they were, but code that reads a projection's weight from its module gets a
`WeightProxy`: the module's class has a property of that name (`_ModuleWithProxies`). The up-projection runs on the
real weight and returns an `ActivationProxy`: the hidden activation, and with it the source, which the up-projection
read. Every operator runs on the activation, and its result keeps the source; the down-projection adds
``layer(source)`` to what it computes.
"""

from __future__ import annotations

import copyreg
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memcompile.common.token_wise import PROJECTIONS, RESHAPES, TRANSPOSES, canonical
from memcompile.errors import CaptureError, PlanError
from memcompile.runtime.stand_ins.replaced import Role, projected_operand, running_layer

if TYPE_CHECKING:
    from memcompile.runtime.layer import MemoryLayer

_PROXIES = "_memcompile_weights"  # on a module: attribute -> the proxy of the parameter there
# What code does to a weight before it projects with it. Not detach or clone, which make a copy for other purposes.
_OF_A_WEIGHT = RESHAPES | TRANSPOSES | frozenset("T to type type_as float half bfloat16 double contiguous".split())


class _TensorProxy:
    """Forwards torch functions, methods, operators and attributes to the tensor `value`."""

    value: Any
    layer: MemoryLayer

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, canonical(func.__name__), args, kwargs or {})

    def __iter__(self) -> Iterator[Any]:
        return iter(_run(torch.unbind, "unbind", (self,), {}))


class WeightProxy(_TensorProxy):
    """A projection's weight, read from its module at each use: FSDP, ``functional_call``, ``to()`` and
    ``load_state_dict(assign=True)`` put other tensors in the place of a parameter.

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
        """Has the module return this proxy for the attribute, whatever parameter is assigned to it later."""
        proxies = self.module.__dict__.setdefault(_PROXIES, {})
        proxies[self.attribute] = self
        own_class: Any = self.module._own_class if isinstance(self.module, _ModuleWithProxies) else type(self.module)
        self.module.__class__ = _class_with_proxies(own_class, tuple(proxies))

    def __getattr__(self, attribute: str) -> Any:
        """What code attached to the parameter."""
        if attribute.startswith("__"):  # copy and pickle ask a bare instance for these
            raise AttributeError(attribute)
        return getattr(self.value, attribute)

    def __repr__(self) -> str:
        return f"WeightProxy({self.name})"


class _DerivedWeightProxy(WeightProxy):
    """A weight transposed or cast, for one call."""

    value: Any = None

    def __init__(self, value: Tensor, weight: WeightProxy) -> None:
        super().__init__(weight.name, weight.role, weight.layer, weight.module, weight.attribute)
        self.value = value


class ActivationProxy(_TensorProxy):
    """The hidden activation of an FFN to which a memory is added.

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
        return f"ActivationProxy({tuple(self.value.shape)} of {self.layer.name})"


class _ModuleWithProxies(nn.Module):
    """What a module whose weights have proxies is, in addition to its own class.

    Another class, and nothing in ``__dict__``: assigning a parameter deletes what is there, and Dynamo has no guards on
    it, so that it would run the graph of a dense block for an equal block with memory.
    """

    _own_class: type[nn.Module]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Also runs when a parameter is assigned."""
        if name in self.__dict__[_PROXIES] and _is_sharded(param) > _is_sharded(self._parameters[name]):
            weight = self.__dict__[_PROXIES][name]
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
            names = tuple(self.__dict__[_PROXIES])
            return (_new_with_proxies, (self._own_class, names, *arguments[1:]), *state)
        return (function, arguments, *state)


@functools.cache
def _class_with_proxies(cls: Any, names: tuple[str, ...]) -> Any:
    """The class of modules of class ``cls`` whose parameters of these names have proxies."""
    attributes: dict[str, Any] = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    attributes |= {name: _proxy_property(name) for name in names}
    return type(cls.__name__, (_ModuleWithProxies, cls), {**attributes, "_own_class": cls})


def _new_with_proxies(cls: Any, names: tuple[str, ...], *arguments: Any) -> nn.Module:
    with_proxies = _class_with_proxies(cls, names)
    return with_proxies.__new__(with_proxies, *arguments)


def _proxy_property(name: str) -> property:
    def get(module: nn.Module) -> Any:
        parameter = module._parameters[name]
        # FSDP reads its shards as attributes; they are never what runs.
        return parameter if _is_sharded(parameter) else module.__dict__[_PROXIES][name]

    return property(get)


def _is_sharded(parameter: Tensor | None) -> bool:
    return hasattr(parameter, "device_mesh")  # a DTensor, whose import takes a second


def _run(call: Callable, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Runs ``call``, an operator of that name, on the tensors of its arguments; the result keeps their source."""
    found: list[_TensorProxy] = []
    result = call(*_unwrapped(args, found), **{key: _unwrapped(value, found) for key, value in kwargs.items()})
    weights = [a for a in found if isinstance(a, WeightProxy)]
    activations = [a for a in found if isinstance(a, ActivationProxy)]
    if name in PROJECTIONS and found:
        return _projected(result, projected_operand(name, args, kwargs, WeightProxy), weights, activations)
    if name in _OF_A_WEIGHT and isinstance(args[0], WeightProxy):
        return _DerivedWeightProxy(result, args[0])
    return _as_proxies(result, activations) if activations else result


def _unwrapped(argument: Any, found: list[_TensorProxy]) -> Any:
    """An argument with tensors in the place of proxies, which are added to ``found``."""
    if isinstance(argument, _TensorProxy):
        found.append(argument)
        return argument.value
    if type(argument) in (list, tuple):
        return type(argument)([_unwrapped(item, found) for item in argument])
    return argument


def _as_proxies(result: Any, activations: list[Any]) -> Any:
    first = activations[0]
    for other in activations:
        if other.layer is not first.layer:
            raise first.error(f"meets that of {other.layer.name}")
    if isinstance(result, Tensor):
        return ActivationProxy(result, first.source, first.layer, any(c.differentiable for c in activations))
    if isinstance(result, (list, tuple)) and any(isinstance(item, Tensor) for item in result):
        return type(result)([_as_proxies(item, activations) for item in result])
    return result


def _projected(result: Any, operand: Any, weights: list[Any], activations: list[Any]) -> Any:
    if not activations and (len(weights) != 1 or not isinstance(operand, Tensor)):
        return result  # of weights alone, or by something else: a penalty on them, a statistic of them
    if len(weights) != 1:
        raise activations[0].error("is projected by something else than the FFN's own weight")
    (weight,) = weights
    layer = weight.layer
    if weight.role is Role.UP:
        if activations:
            raise activations[0].error(f"is projected by {weight.name}")
        if operand.shape[-1] != layer.width:
            raise CaptureError(
                f"memcompile: {weight.name} projects {tuple(operand.shape)}, which does not have its {layer.width} "
                f"features last; exclude the block from memory_layers"
            )
        return ActivationProxy(result, operand, layer, result.requires_grad)
    if not isinstance(operand, ActivationProxy) or operand.layer is not layer:
        raise CaptureError(
            f"memcompile: a memory is added to the output of {weight.name}, but it projects "
            f"{type(operand).__name__} that its own up-projection did not produce; exclude its block from memory_layers"
        )
    if operand.differentiable and torch.is_grad_enabled() and not operand.value.requires_grad:
        raise operand.error("lost its gradient between the projections: an autograd.Function takes tensors alone")
    # Some models keep the down-projection in a higher precision (T5): the memory has its dtype.
    memory = running_layer(layer, weight.module)(operand.source.to(layer.query_weight.dtype))
    return result + memory.reshape(result.shape).to(result.dtype)


def _forwarded(name: str, call: Callable) -> Callable:
    def method(self: _TensorProxy, *args: Any, **kwargs: Any) -> Any:
        return _run(call, canonical(name), (self, *args), kwargs)

    return method


def _forwarded_reversed(name: str, call: Callable) -> Callable:
    def method(self: _TensorProxy, other: Any) -> Any:
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
        setattr(_TensorProxy, _name, _forwarded(_name, _method(_name)) if _callable else _attribute(_name))
for _name in "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split():
    _operator = getattr(operator, f"__{_name}__")
    setattr(_TensorProxy, f"__{_name}__", _forwarded(f"__{_name}__", _operator))
    setattr(_TensorProxy, f"__r{_name}__", _forwarded_reversed(f"__r{_name}__", _operator))
    setattr(_TensorProxy, f"__i{_name}__", _forwarded(f"__i{_name}__", getattr(operator, f"__i{_name}__")))
for _name in "neg pos abs invert eq ne lt le gt ge getitem setitem".split():
    setattr(_TensorProxy, f"__{_name}__", _forwarded(f"__{_name}__", getattr(operator, f"__{_name}__")))
for _conversion in (bool, int, float, complex, len):
    setattr(_TensorProxy, f"__{_conversion.__name__}__", _forwarded(_conversion.__name__, _conversion))
