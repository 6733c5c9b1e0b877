"""Triton kernels: the language of a GPU's programs, and nothing of PyTorch. `launch.py` runs them."""
