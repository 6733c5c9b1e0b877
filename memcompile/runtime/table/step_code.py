"""What the code of an optimizer's class does, as far as the names in it tell."""

from collections.abc import Callable, Iterable, Iterator
from types import CodeType
from typing import Any

from torch.optim import Optimizer


def calls_parent(step: Callable[..., Any], parents: Iterable[type]) -> bool:
    """Whether a step calls that of a class which its own is derived from, and so leaves the parameters to it."""
    names = {name for code in _codes_in(step) for name in (*code.co_names, *code.co_freevars)}
    return "step" in names and not names.isdisjoint({"super", "__class__", *(parent.__name__ for parent in parents)})


def reads_parameters(kind: type[Optimizer]) -> bool:
    """Whether a class of optimizers looks at the parameters in its groups when one is built, or steps."""
    methods: dict[str, Any] = {}
    for owner in reversed(kind.__mro__[: kind.__mro__.index(Optimizer)]):
        methods |= vars(owner)
    names = [name for name in ("__init__", "step") if name in methods]
    for name in names:  # and those that they call
        for code in _codes_in(methods[name]):
            if "params" in code.co_consts:
                return True
            names.extend(called for called in code.co_names if called in methods and called not in names)
    return False


def _codes_in(function: Any) -> Iterator[CodeType]:
    """Of a function, those inside of it, and what it decorates."""
    while function is not None:
        codes: list[CodeType] = [function.__code__] if hasattr(function, "__code__") else []
        for code in codes:
            yield code
            codes.extend(constant for constant in code.co_consts if isinstance(constant, CodeType))
        function = getattr(function, "__wrapped__", None)
