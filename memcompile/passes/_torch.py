"""The private PyTorch API of the passes, imported here and nowhere else in the layer.

Tried with torch 2.11, 2.13 and 2.15.
"""

from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.graph import _PyTreeCodeGen as PyTreeCodeGen
from torch.fx.graph_module import _assign_attr as assign_attribute
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn.modules.conv import _ConvNd as ConvNd
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "ConvNd",
    "FakeTensor",
    "FakeTensorMode",
    "FakeTensorProp",
    "HigherOrderOperator",
    "OpOverload",
    "PyTreeCodeGen",
    "TorchDispatchMode",
    "assign_attribute",
    "get_proxy_mode",
    "make_fx",
    "pytree",
]
