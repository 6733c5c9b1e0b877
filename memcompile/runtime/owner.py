"""Where the table of a memory lies: on the lowest module with a forward of its own that contains all of its layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from memcompile.common.sites import FfnSite, owner_path

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def owner_of(root: nn.Module, chosen: Sequence[FfnSite]) -> tuple[nn.Module, str]:
    """The module that holds the table of these sites, and what its names start with: "" or "model.".

    It is the decoder, not the LM head's wrapper, or the module of PEFT, Lightning or a loss: whoever saves, optimises,
    copies or loads it has the table. It contains the whole stack of blocks that the sites are of, so that the table
    does not lie in a block, which FSDP2 shards by itself.
    """
    name = owner_path(chosen, lambda path: _runs(root, path))
    return root.get_submodule(name), f"{name}." if name else ""


def _runs(root: nn.Module, path: str) -> bool:
    """Whether there is a module of this path with a forward of its own: a list has none, and a sequence none to speak
    of.
    """
    try:
        module = root.get_submodule(path)
    except AttributeError:  # the path of a stack may end within a name, as `block` of `block3`
        return False
    own = type(module).forward is not nn.Module.forward
    return own and not isinstance(module, _CONTAINERS)
