"""Hypothesis for this folder: the same examples on every run, and no time limit on one example."""

import torch
from hypothesis import settings

settings.register_profile("lowering", deadline=None, derandomize=True, max_examples=50, database=None)
settings.load_profile("lowering")

# The tensors are small, and threads that spin for work cost most of the time on a shared machine.
torch.set_num_threads(1)
