"""States of optimizers are loaded as they were saved: `Optimizer.load_state_dict` casts them to the dtype of their
parameter, which would round fp32 moments of bf16 values, and numbers of steps.
"""

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

_ON_THE_CPU = ("history",)  # state that stays there


def loaded_exactly(
    optimizer: Optimizer,
    load: Callable[[dict[str, Any]], None],
    state_dict: dict[str, Any],
    only: Collection[int] | None = None,
) -> None:
    """Loads by `load(state_dict)`, and restores the dtypes that were saved.

    Args:
        only: the ids of the parameters whose state is restored; None is all.
    """
    seen: list[dict[str, Any]] = []
    # The last of the hooks, it sees what the others made of the dict.
    handle = optimizer.register_load_state_dict_pre_hook(lambda _, loaded: seen.append(loaded))
    try:
        load(state_dict)
    finally:
        handle.remove()
    (saved,) = seen
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, number in zip(parameters, numbers, strict=True):
        for name, value in saved["state"].get(number, {}).items() if only is None or id(parameter) in only else ():
            if isinstance(value, Tensor):
                value = value.to("cpu" if name in _ON_THE_CPU or name == "step" else parameter.device)
            optimizer.state[parameter][name] = value
