"""The private PyTorch API of the runtime, imported here and nowhere else in the layer.

Tried with torch 2.11, 2.13 and 2.15.
"""

from torch._dynamo import OptimizedModule

__all__ = ["OptimizedModule"]
