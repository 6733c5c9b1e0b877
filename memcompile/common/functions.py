"""What the name of a function tells of it, as `__torch_function__` is given functions."""

from collections.abc import Callable

_ASSIGNMENTS = frozenset({"__set__", "__setitem__"}) | frozenset(
    f"__i{operator}__" for operator in "add sub mul truediv floordiv mod pow and or xor lshift rshift".split()
)


def writes(func: Callable) -> bool:
    """Whether a function of PyTorch writes one of its arguments: in-place functions, assignments, collectives."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _ASSIGNMENTS or getattr(func, "__module__", "").startswith("torch.distributed")
