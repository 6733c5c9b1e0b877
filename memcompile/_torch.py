"""The private PyTorch API of the front door, imported here and nowhere else beside it.

Tried with torch 2.11, 2.13 and 2.15.
"""

from torch._dynamo import list_backends, register_backend
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options, list_options
from torch._inductor.compile_fx import compile_fx

__all__ = [
    "compile_fx",
    "inductor_config",
    "list_backends",
    "list_mode_options",
    "list_options",
    "register_backend",
]
