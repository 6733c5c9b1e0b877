"""The state of an optimizer, loaded in the dtypes that it was saved in.

`Optimizer.load_state_dict` casts it to the dtype of its parameter, which rounds fp32 moments of bf16 parameters.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All that an optimizer holds, in the order in which its state dict numbers them."""
    groups = getattr(optimizer, "param_groups", ())  # a subclass may have none
    return [parameter for group in groups for parameter in group["params"]]


def optimizers_inside(optimizer: Optimizer) -> Iterator[Optimizer]:
    """The optimizers that are attributes of one, or lie in a list, tuple or dict that is one."""
    for name, value in vars(optimizer).items():
        if name not in ("state", "param_groups"):
            several = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
            yield from (v for v in (value, *several) if isinstance(v, Optimizer) and v is not optimizer)


def numbers_in(state_dict: Mapping[str, Any]) -> list[int]:
    """The numbers of the parameters in a state dict, in their order."""
    return [number for group in state_dict["param_groups"] for number in group["params"]]


def load_exactly(
    optimizer: Optimizer,
    load: Callable[[dict[str, Any]], object],
    state_dict: dict[str, Any],
    exact: Callable[[Tensor], bool] = lambda parameter: True,
) -> None:
    """Loads a state dict, and gives each tensor of the state its dtype in the state dict back.

    Args:
        load: PyTorch's `load_state_dict` of the optimizer, which runs its hooks: they may change the state dict.
        exact: of which parameters the state keeps its dtypes. The others have what `load` makes of it.
    """
    seen: list[dict[str, Any]] = []
    # It is the last of the hooks, and is given what the others made of the state dict.
    handle = optimizer.register_load_state_dict_pre_hook(lambda _, loaded: seen.append(loaded))
    try:
        load(state_dict)
    finally:
        handle.remove()
    restore_dtypes(optimizer, seen[0], exact)


def restore_dtypes(optimizer: Optimizer, state_dict: Mapping[str, Any], exact: Callable[[Tensor], bool]) -> None:
    """Gives each tensor of the state its dtype in a state dict back, which was loaded just before."""
    for parameter, number in zip(parameters_of(optimizer), numbers_in(state_dict), strict=True):
        saved = state_dict["state"].get(number)
        if not saved or not exact(parameter):
            continue
        state = optimizer.state[parameter]
        for name, value in saved.items():
            loaded = state.get(name)
            if isinstance(value, Tensor) and isinstance(loaded, Tensor) and loaded.dtype != value.dtype:
                state[name] = value.to(loaded.device)
