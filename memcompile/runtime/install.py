"""Puts memory layers into a model, in the place of its chosen FFNs or beside them; or, for a rehearsal, small
layers, by which it is known before whether the model's own code runs with stand-ins.
"""

import contextlib
import dataclasses
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memcompile.common.sites import LAYER_NAME, VALUES_NAME, FfnSite, owner_path
from memcompile.config import MemoryConfig
from memcompile.errors import PlanError
from memcompile.lowering import memory_lookup
from memcompile.lowering.parameters import lookup_options, new_buffers, new_layer, values_shape
from memcompile.runtime.distributed.sharding import cut_layers, new_sharded_values
from memcompile.runtime.layer import MemoryLayer
from memcompile.runtime.pool import MemoryPool
from memcompile.runtime.stand_ins.added import WeightProxy
from memcompile.runtime.stand_ins.modules import mark_replaced
from memcompile.runtime.stand_ins.operations import Operations
from memcompile.runtime.stand_ins.replaced import ReplacedParameter, Role
from memcompile.runtime.state_dicts import tell_part, watch_state_dicts
from memcompile.runtime.storage.frozen_values import create_values, keep_in_place

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def owner_of(root: nn.Module, chosen: Sequence[FfnSite]) -> tuple[nn.Module, str]:
    """Where the table of these sites lies, and what its names start with ("" or "model."): on the lowest module with a
    forward of its own that contains the whole stack of blocks that they are of.

    It is the decoder, not the LM head's wrapper, or the module of PEFT, Lightning or a loss: whoever saves, optimises,
    copies or loads it has the table. It is no block, which FSDP2 shards by itself.
    """
    name = owner_path(chosen, lambda path: _runs(root, path))
    return root.get_submodule(name), f"{name}." if name else ""


def _runs(root: nn.Module, path: str) -> bool:
    """Whether there is such a module with a forward of its own: a list has none, and a sequence none to speak of."""
    try:
        module = root.get_submodule(path)
    except AttributeError:  # the path of a stack may end within a name, as `block` of `block3`
        return False
    return type(module).forward is not nn.Module.forward and not isinstance(module, _CONTAINERS)


def install(
    pool: MemoryPool, root: nn.Module, chosen: list[FfnSite], operations: Mapping[str, Operations]
) -> dict[str, dict[str, nn.Parameter]]:
    """Creates the values and one `MemoryLayer` a site. Replaces the FFNs' parameters by stand-ins, or puts stand-ins
    before their weights where the memory is added.

    A layer is registered as ``memory`` on the module that held the down-projection's weight, so that its
    parameters read ``...mlp.down_proj.memory.half_keys``. The sites are named from ``root``, and ``operations`` has
    what the rehearsal recorded of each, by its down-projection.

    The model changes only after everything new exists: an error, or a table too large for the memory, leaves it
    as it was. Returns the parameters of each chosen FFN by their names, under the key of its layer in the pool; those
    of replaced ones are no longer in the model.

    Raises:
        PlanError: the model already uses one of the names, its FFNs lie on different devices, or the file of its values
            does not fit.
    """
    _check(pool, root, chosen)
    down = root.get_parameter(chosen[0].down)
    if pool.table.sharded is None:
        values = create_values(pool.config, pool.width, down.dtype, down.device)
    else:
        values = new_sharded_values(pool, down.dtype, down.device)
    layers = []
    for number, site in enumerate(chosen):
        down = root.get_parameter(site.down)
        layer = MemoryLayer(pool, number, site.name or site.down, site.width, down.dtype, down.device)
        layer.operations = operations[site.down]
        layer.operations.records = False
        layers.append(layer.train(_holder(root, site).training))

    keys = [site.down.removeprefix(pool.prefix) for site in chosen]
    ffns = {
        key: {name: root.get_parameter(name) for name in site.parameters}
        for key, site in zip(keys, chosen, strict=True)
    }
    pool.attach(values)
    if pool.config.frozen:
        keep_in_place(root)
    watch_state_dicts(pool, root)
    for key, site, layer in zip(keys, chosen, layers, strict=True):
        put_stand_ins(root, site, layer, pool.adds)
        _holder(root, site).add_module(LAYER_NAME, layer)
        pool.layers[key] = layer
        layer.register_state_dict_pre_hook(tell_part)  # type: ignore[no-untyped-call]
    if not pool.adds:
        pool.removed_parameters = sum(p.numel() for ffn in ffns.values() for p in ffn.values())
    if pool.table.sharded is not None:
        cut_layers(pool)
    _keep_padded(root, layers)
    return ffns


def _keep_padded(root: nn.Module, layers: list[MemoryLayer]) -> None:
    """In eval mode `nn.TransformerEncoder` packs a padded batch into a nested tensor for all of its layers, and asks
    only the first of them whether it can take one.
    """
    for module in root.modules():
        if isinstance(module, nn.TransformerEncoder) and any(layer in module.modules() for layer in layers):
            module.use_nested_tensor = False


def _holder(root: nn.Module, site: FfnSite) -> nn.Module:
    """The module that holds the down-projection's weight."""
    return root.get_submodule(site.down.rpartition(".")[0])


def put_stand_ins(root: nn.Module, site: FfnSite, layer: Any, adds: bool) -> None:
    """Puts stand-ins that run ``layer`` in the place of the FFN's parameters, or before its weights."""
    for name in (*site.up, site.down) if adds else site.parameters:
        path, _, attribute = name.rpartition(".")
        holder, parameter = root.get_submodule(path), root.get_parameter(name)
        role = Role.UP if name in site.up else Role.DOWN if name == site.down else Role.OTHER
        if adds:
            WeightProxy(name, role, layer, holder, attribute).install()
            continue
        width = parameter.numel() // site.width if role is Role.UP else 0
        del holder._parameters[attribute]
        state = name.removeprefix(f"{site.name}.")  # equal blocks share a compiled graph
        within = holder if role is Role.DOWN else None
        setattr(holder, attribute, ReplacedParameter(name, role, width, layer, parameter.shape, state, within))
        mark_replaced(holder)


def _check(pool: MemoryPool, root: nn.Module, chosen: list[FfnSite]) -> None:
    if hasattr(pool.owner, VALUES_NAME):
        raise PlanError(f"{type(pool.owner).__name__} already has an attribute {VALUES_NAME!r}: rename it")
    devices: dict[torch.device, str] = {}
    for site in chosen:
        if hasattr(_holder(root, site), LAYER_NAME):
            raise PlanError(f"the module that holds {site.down!r} already has an attribute {LAYER_NAME!r}: rename it")
        devices.setdefault(root.get_parameter(site.down).device, site.name or site.down)
    if len(devices) > 1:
        raise PlanError(
            f"the chosen blocks lie on different devices ({', '.join(f'{n!r} on {d}' for d, n in devices.items())}), "
            f"but share one table of values: choose blocks of one device by memory_layers=[...]"
        )


class RehearsedLayer:
    """What stand-ins call in the place of a memory layer, for one forward and backward of a rehearsal: a layer of the
    same kind, width, dtype and device, as small as can be.

    Attributes:
        outputs: what each call returned, and a parameter that it read.
        operations: what it records of the FFN.
    """

    def __init__(
        self,
        site: FfnSite,
        config: MemoryConfig,
        dtype: torch.dtype,
        device: torch.device,
        operations: Operations,
    ) -> None:
        self.name, self.width, self._device = site.name or site.down, site.width, device
        small = {"memory_layers": 1, "n_keys": 2, "heads": 1, "top_k": 1, "key_dim": 2, "value_dim": site.width}
        here = {"values_storage": "device", "values_path": None}
        # Without the loss, which is not served in every dtype: a model may be planned for inference alone.
        self._config = dataclasses.replace(config, balance_loss=0.0, **small, **here)  # type: ignore[arg-type]
        self._options = lookup_options(self._config, 0)
        self.operations = operations
        self.query_weight = types.SimpleNamespace(dtype=dtype, device=device)
        self.outputs: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor) -> Tensor:
        dtype, config = self.query_weight.dtype, self._config
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=()):
            tensors: dict[str, Any] = {
                "values": nn.Parameter(torch.zeros(values_shape(config, self.width), dtype=dtype, device=x.device)),
                **new_layer(config, self.width, dtype, self._device),
                **new_buffers(config, dtype, self._device),
            }
        output = memory_lookup(x, **tensors, **self._options, training=True)
        self.outputs.append((output, tensors["query_weight"]))
        return output


@contextlib.contextmanager
def rehearsed_stand_ins(
    root: nn.Module, sites: Sequence[FfnSite], config: MemoryConfig, operations: Mapping[str, Operations]
) -> Iterator[list[RehearsedLayer]]:
    """Puts stand-ins with layers for a rehearsal into the FFNs of ``sites``, which record what ``operations`` the FFNs
    have; afterwards the model is as it was.
    """
    names = [name for site in sites for name in site.parameters]
    holders = {id(h): h for h in (root.get_submodule(name.rpartition(".")[0]) for name in names)}.values()
    before = [(h, type(h), dict(h.__dict__), dict(h._parameters)) for h in holders]
    layers = []
    try:
        for site in sites:
            down = root.get_parameter(site.down)
            layers.append(RehearsedLayer(site, config, down.dtype, down.device, operations[site.down]))
            put_stand_ins(root, site, layers[-1], config.placement == "add")
        yield layers
    finally:
        for holder, cls, attributes, parameters in before:
            holder.__class__ = cls
            for name in holder.__dict__.keys() - attributes.keys():
                del holder.__dict__[name]
            holder._parameters.clear()
            holder._parameters.update(parameters)  # in their order
