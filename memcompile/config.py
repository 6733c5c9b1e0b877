"""MemoryConfig: every option of a memory, validated, frozen and serialisable. Knows no model."""

from __future__ import annotations

import dataclasses
import difflib
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from memcompile.common.sites import FfnSite
from memcompile.errors import OptionError

LayerChoice = int | str | Sequence[int | str] | Callable[[FfnSite], bool]

VARIANTS = ("memory+", "memory", "pkm", "peer")
TABLES = ("shared", "separate")
CHOICES: dict[str, tuple[str | None, ...]] = {
    "placement": ("replace", "add"),
    "variant": VARIANTS,
    "query_norm": (None, "none", "batch"),
    "weighting": ("softmax", "sigmoid"),
    "tables": TABLES,
    "values_grad": ("auto", "dense", "sparse"),
    "values_optimizer": (None, "row_adamw", "lazy_adam", "row_wise_adagrad", "row_sgd"),
    "values_state_dtype": ("float32", "bfloat16"),
    "values_storage": ("device", "host", "mmap"),
}
SPARSE_FROM = 2**16  # slots
# May change in a checkpoint's life.
TRAINING_OPTIONS = ("values_lr", "values_grad", "values_optimizer", "values_state_dtype", "balance_loss")
STORAGE_OPTIONS = ("values_storage", "values_path")  # of a machine: no checkpoint has them
LEARNING_DEFAULTS = {"values_grad": "auto", "values_optimizer": None, "values_state_dtype": "float32"}
MAX_SLOTS = 2**31  # they are numbered in int32
MAX_KEYS = 46340  # whose slots are no more


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig:
    """What the memory looks like, and which FFNs it replaces or is added to.

    Defaults follow "Memory Layers at Scale" (arXiv 2412.09764).

    Args:
        memory_layers: which FFNs become memory. A number places that many, centred and evenly strided over the
            depth (3 of 24 gives blocks 4, 12, 20; between two blocks the later one). Where a model has several
            stacks (:attr:`FfnSite.stack`: encoder and decoder), the number is divided over them in proportion to
            their blocks, by largest remainder; a tie goes to the stack that runs later. Or a name, a glob
            (``"decoder.*"``), or a list of indices, names and globs; ``"all"`` for every block that can be
            replaced; a filter ``f(site) -> bool``. Indices and names are those that :func:`memcompile.explain`
            shows; a block that runs several times (shared weights) counts once.
        placement: "replace" puts the memory in the place of the FFN, whose parameters leave the model. "add" keeps
            the FFN and adds the memory of its input to its output. The memory's output projection is then zero at
            first, and there is one in a plain Memory too, so that the model starts as it was: the projection learns
            from the first step on, the rest of the memory from the second.
        n_keys: half-keys on each side; the memory has ``n_keys ** 2`` slots. None chooses the power of two
            between 64 and 1024 that keeps the values within four times the model's own parameters.
        heads: independent queries a token.
        top_k: slots retrieved by each head; at most ``n_keys``.
        key_dim: width of one head's query, even; each half-key has ``key_dim / 2`` entries. None is half of
            the model's width.
        value_dim: numbers of a value v. None is the model's width.
        variant: what a layer computes of a token x, of its hits' weights w and their rows:

            - "memory+" (arXiv 2412.09764): ``W_out (y * silu(W_gate x))`` of ``y = sum of w * v``.
            - "memory" (the same): ``y`` without a gate, projected only where ``value_dim`` differs from the width, or
              where the memory is added.
            - "pkm" (Lample et al. 2019, arXiv 1907.05242): as "memory", with BatchNorm of the query.
            - "peer" (He 2024, arXiv 2407.04153): as "pkm", of ``y = sum of w * gelu(u . x) * v``. A row is a pair
              [u | v], of width + ``value_dim`` numbers. The chosen blocks have one width. Each head has half-keys of
              its own, as in all variants; in the paper the heads share them.
        weighting: the weights of a head's hits: "softmax" over their scores, or the "sigmoid" of each.
        tables: "shared" is one table, which all layers read. "separate" is a table of ``n_keys ** 2`` slots for each
            layer; they lie in one parameter, one after the other.
        gate: whether a layer has the gate of "memory+". None follows the variant; a bool is for ablations.
        query_norm: "batch" is BatchNorm of the query, before the unit norm of ``qk_norm``. Its running statistics are
            buffers of each layer; they move in train mode alone. "none" is for none. None follows the variant: "batch"
            in "pkm" and "peer", else "none".
        qk_norm: scale both halves of the query and every half-key to unit norm, with a learned temperature a
            head. For large memories on small base models, which train unstably without it.
        balance_loss: factor of a loss that spreads the hits over the half-keys (of "Switch Transformers", arXiv
            2101.03961, for half-keys): ``n_keys * sum of f_i * P_i``, with f_i the share of hits that half-key i has,
            and P_i the mean of its softmax over all scores; the mean over sides and heads. It is 1 where hits are
            spread evenly. In train mode its gradient is added in each backward through the layer, with the factor 1:
            what the loop multiplies its own loss by does not multiply this one.
        values_lr: constant learning rate of the values, whatever the optimizer and its schedule use for the
            rest; None follows the rest.

        values_grad: "dense" for a gradient of all slots. "sparse" for one of the rows that were hit, as a coalesced
            sparse COO tensor: a step then costs what it touches, however many slots there are. "auto" is "sparse" from
            65,536 slots on, else "dense".
        values_optimizer: the rule by which the table is stepped when the optimizer that holds it steps: "row_adamw",
            "lazy_adam", "row_wise_adagrad" or "row_sgd" (:mod:`memcompile.optim`). None is that of the optimizer where
            there is one by rows: row_adamw in AdamW (and in Adam without weight decay), row_sgd in SGD without
            momentum, lazy_adam in SparseAdam, row_wise_adagrad in Adagrad. With any other optimizer it is row_adamw,
            which the log says once.
        values_state_dtype: "float32", or "bfloat16" for moments in half the memory, rounded stochastically.

        values_storage: where the values lie. "device": with the model. The others are for inference: the values do not
            learn, and stay where they are when the model is moved or cast. "mmap": in a file, of which the system keeps
            the pages that are read in whatever memory is free; a table may be larger than memory. "host": in the CPU's
            memory, for a model on an accelerator. Rows are summed where they lie, and the sums move.
        values_path: the file of "mmap", written by :func:`memcompile.store_values`.

    Raises:
        OptionError: naming the option, what it got and what it takes.
    """

    memory_layers: LayerChoice = 3
    placement: str = "replace"
    n_keys: int | None = None
    heads: int = 4
    top_k: int = 32
    key_dim: int | None = None
    value_dim: int | None = None
    variant: str = "memory+"
    weighting: str = "softmax"
    tables: str = "shared"
    gate: bool | None = None
    query_norm: str | None = None
    qk_norm: bool = False
    balance_loss: float = 0.0
    values_lr: float | None = 1e-3
    values_grad: str = "auto"
    values_optimizer: str | None = None
    values_state_dtype: str = "float32"
    values_storage: str = "device"
    values_path: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "memory_layers", _checked_layers(self.memory_layers))
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                *others, last = map(repr, choices)
                raise OptionError(f"{name} must be {', '.join(others)} or {last}, got {getattr(self, name)!r}")
        for name in ("heads", "top_k", "n_keys", "key_dim", "value_dim"):
            value, none = getattr(self, name), "" if name in ("heads", "top_k") else " or None"
            is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not is_count and not (none and value is None):
                raise OptionError(f"{name} must be an integer >= 1{none}, got {value!r}")
        for name, none in (("gate", ", False or None"), ("qk_norm", " or False")):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (value is None and name == "gate"):
                raise OptionError(f"{name} must be True{none}, got {value!r}")
        if self.key_dim is not None and self.key_dim % 2:
            raise OptionError(f"key_dim must be even (two half-keys share it), got {self.key_dim}")
        if self.n_keys is not None and self.n_keys > MAX_KEYS:
            raise OptionError(f"n_keys must be at most {MAX_KEYS} (n_keys**2 slots fit an int32), got {self.n_keys}")
        if self.n_keys is not None and self.slots > MAX_SLOTS:
            raise OptionError(
                f"tables='separate' has {self.slots:,} slots in {self._tables} layers, and {MAX_SLOTS:,} fit an int32: "
                f"lower n_keys, or choose fewer memory_layers"
            )
        if self.n_keys is not None and self.top_k > self.n_keys:
            raise OptionError(f"top_k={self.top_k} exceeds n_keys={self.n_keys}: lower top_k or raise n_keys")
        for name, wanted in (("values_lr", "a learning rate >= 0 or None"), ("balance_loss", "a factor >= 0")):
            given: Any = getattr(self, name)
            if given is None and name == "values_lr":
                continue
            if isinstance(given, bool) or not isinstance(given, numbers.Real) or not 0 <= float(given) < float("inf"):
                raise OptionError(f"{name} must be {wanted}, got {given!r}")
            object.__setattr__(self, name, float(given))
        path = self.values_path
        if path is not None:
            if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
                raise OptionError(f"values_path must be the path of a file or None, got {path!r}")
            object.__setattr__(self, "values_path", os.fspath(path))
        if self.values_storage == "mmap" and path is None:
            raise OptionError(
                "values_storage='mmap' needs values_path='...', the file that memcompile.store_values(model, path) made"
            )
        if self.values_storage != "mmap" and path is not None:
            raise OptionError(
                f"values_path={path!r} is of values_storage='mmap', got values_storage={self.values_storage!r}: give "
                f"both, or neither"
            )
        for name, default in LEARNING_DEFAULTS.items() if self.frozen else ():
            if getattr(self, name) != default:
                raise OptionError(
                    f"{name}={getattr(self, name)!r} is for values that learn, and those of values_storage="
                    f"{self.values_storage!r} do not: leave it out ({name}={default!r}), or use values_storage='device'"
                )

    @property
    def frozen(self) -> bool:
        """Whether the values are for inference alone."""
        return self.values_storage != "device"

    @property
    def has_gate(self) -> bool:
        """What ``gate`` means for the variant."""
        return self.variant == "memory+" if self.gate is None else self.gate

    @property
    def has_batch_norm(self) -> bool:
        """What ``query_norm`` means for the variant."""
        return self.variant in ("pkm", "peer") if self.query_norm is None else self.query_norm == "batch"

    @property
    def has_pairs(self) -> bool:
        """Whether a row of the table is a pair [u | v]."""
        return self.variant == "peer"

    def pair_at(self, width: int) -> int:
        """The column of a row at which v begins, for layers of this width."""
        return width if self.has_pairs else 0

    @property
    def form(self) -> dict[str, Any]:
        """``variant``, ``gate`` and ``query_norm``, the same for all configs that mean the same layer: the last two are
        not None, and the variants without pairs follow from them.
        """
        without_pairs = "pkm" if self.has_batch_norm else "memory+" if self.has_gate else "memory"
        return {
            "variant": self.variant if self.has_pairs else without_pairs,
            "gate": self.has_gate,
            "query_norm": "batch" if self.has_batch_norm else "none",
        }

    @property
    def slots(self) -> int:
        """The slots of all layers together, with ``n_keys`` given; of `tables="separate"` as far as ``memory_layers``
        says how many layers there are.
        """
        assert self.n_keys is not None
        return self.n_keys**2 * self._tables

    @property
    def _tables(self) -> int:
        layers = self.memory_layers if self.tables == "separate" else 1
        return layers if isinstance(layers, int) else len(layers) if isinstance(layers, tuple) else 1

    @property
    def gradient(self) -> str:
        """What ``values_grad`` means for ``n_keys`` half-keys a side: "dense" or "sparse"."""
        if self.values_grad != "auto":
            return self.values_grad
        large = self.n_keys is not None and self.slots >= SPARSE_FROM
        return "sparse" if large and not self.frozen else "dense"

    def to_dict(self) -> dict[str, Any]:
        """The options as plain JSON types; a filter has none, so plans record the names that it chose."""
        layers = self.memory_layers
        if callable(layers):
            raise OptionError("a memory_layers filter cannot be serialised: name the layers that it chooses")
        return self.as_options() | {"memory_layers": layers if isinstance(layers, (int, str)) else list(layers)}

    def as_options(self) -> dict[str, Any]:
        """The fields by name, a filter included."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> MemoryConfig:
        """The inverse of :meth:`to_dict`; unknown options are errors that suggest the nearest name."""
        check_names(options)
        return cls(**options)


OPTION_NAMES = tuple(f.name for f in dataclasses.fields(MemoryConfig))


def check_names(options: Mapping[str, Any], also_known: Sequence[str] = ()) -> None:
    """Raises OptionError for the first name that is neither an option of ours nor in ``also_known``."""
    for name in options:
        if name not in OPTION_NAMES and name not in also_known:
            near = difflib.get_close_matches(name, [*OPTION_NAMES, *also_known], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"options are {', '.join([*OPTION_NAMES, *also_known])}"
            raise OptionError(f"unknown memcompile option {name!r}: {hint}")


def _checked_layers(layers: object) -> LayerChoice:
    wanted = "memory_layers must be a number of layers, a name or glob, 'all', a list of indices or names, or a filter"
    if isinstance(layers, int) and not isinstance(layers, bool):
        if layers < 1:
            raise OptionError(f"{wanted}; got {layers}, which leaves nothing to replace")
        return layers
    if callable(layers) or (isinstance(layers, str) and layers):
        return layers
    if isinstance(layers, Sequence) and not isinstance(layers, (str, bytes)):
        if not layers:
            raise OptionError(f"{wanted}; got an empty list")
        for item in layers:
            if isinstance(item, bool) or not isinstance(item, (int, str)):
                raise OptionError(f"{wanted}; the list holds {item!r}")
        return tuple(layers)
    raise OptionError(f"{wanted}; got {layers!r}")
