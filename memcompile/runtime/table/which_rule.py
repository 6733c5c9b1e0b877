"""Which rule steps the rows of a table in an optimizer, and with which options.

The table is stepped by `values_optimizer`, at `values_lr`, when the optimizer that holds it steps. Without a
`values_optimizer` the rule is that of the optimizer where there is one by rows, otherwise AdamW's.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Optimizer, SparseAdam

from memcompile.config import MemoryConfig
from memcompile.errors import OptionError
from memcompile.runtime.optim import RowOptimizer
from memcompile.runtime.table import rules
from memcompile.runtime.table.rules import RULES, Options, Rule

log = logging.getLogger(__name__)


Body = Callable[..., Any]  # the step of an optimizer's class


def rule_in(
    optimizer: Optimizer, group: dict[str, Any], config: MemoryConfig, body: Body
) -> tuple[type[Rule], Options]:
    """The rule that steps the values of this group of an optimizer, and its options.

    Args:
        body: the step that steps the optimizer's other parameters: a subclass may have its own, or call its parent's.

    Raises:
        OptionError: an option of the group is not served.
    """
    own = _rule_of(optimizer, group, body)
    rule = RULES[config.values_optimizer] if config.values_optimizer is not None else own or rules.AdamW
    options = dict(rule.defaults)
    # What betas and eps mean is known of these alone.
    known = own is not None or any(_steps_as(optimizer, kind, body) for kind in (Adam, SGD, Adagrad, SparseAdam))
    for name in rule.defaults if known else ("weight_decay", "maximize"):
        if name in group and _are_alike(group[name], rule.defaults[name]):
            options[name] = group[name]
    if not known and "weight_decay" not in group:
        options["weight_decay"] = 0.0  # the optimizer decays nothing
    options["lr"] = float(group["lr"] if config.values_lr is None else config.values_lr)
    if config.values_state_dtype == "bfloat16" and "state_dtype" in options:
        options["state_dtype"] = torch.bfloat16
    try:
        rule.check(options)
    except OptionError as error:
        raise OptionError(f"the memory's values in {type(optimizer).__name__}, by {rule.name}: {error}") from error
    _say(type(optimizer).__name__, rule.name, own is rule)
    return rule, options


def _rule_of(optimizer: Optimizer, group: dict[str, Any], body: Body) -> type[Rule] | None:
    """The rule by which rows are stepped as an optimizer would step them; None where there is none."""
    if isinstance(optimizer, RowOptimizer):
        return optimizer.rule
    if _steps_as(optimizer, Adam, body):
        decoupled = group.get("decoupled_weight_decay", False) or not group["weight_decay"]
        return rules.AdamW if decoupled and not group["amsgrad"] else None
    if _steps_as(optimizer, SGD, body):
        return None if group["momentum"] else rules.SGD
    if _steps_as(optimizer, SparseAdam, body):
        return rules.LazyAdam
    return rules.RowWiseAdagrad if _steps_as(optimizer, Adagrad, body) else None


def _steps_as(optimizer: Optimizer, kind: type[Optimizer], body: Body) -> bool:
    """Whether a step of an optimizer is that of this class."""
    return isinstance(optimizer, kind) and inspect.unwrap(body) is inspect.unwrap(kind.step)


def _are_alike(given: Any, default: Any) -> bool:
    """Whether an option of another optimizer is one of ours: Adafactor's eps is a pair."""
    numbers = (int, float, Tensor)
    return isinstance(given, numbers) if isinstance(default, numbers) else isinstance(given, type(default))


@functools.cache
def _say(optimizer: str, rule: str, same: bool) -> None:
    reason = "" if same else f", which is not the rule of {optimizer} (values_optimizer=... chooses another)"
    log.log(
        logging.INFO if same else logging.WARNING,
        "memcompile: %s.step() steps the table of values by rows, by the rule %r%s",
        optimizer,
        rule,
        reason,
    )
