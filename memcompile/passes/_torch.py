"""The private PyTorch API of the passes, imported here and nowhere else in the layer.

Tried with torch 2.11, 2.13 and 2.15.
"""

from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = ["FakeTensor", "FakeTensorMode", "make_fx"]
