"""What imports left on the heap: each collection, and each plan, which looks for fake tensors and optimizers among all
objects, takes most of its time to pass it by, and a test has little beside.
"""

from __future__ import annotations

import gc


def freeze() -> None:
    """Has the collector, and plans, pass by what is there already."""
    gc.collect()
    gc.freeze()
