"""Nothing is collected here where kernels are not interpreted, and fewer examples are drawn where they are."""

import pytest
from hypothesis import settings

from memcompile.lowering.triton.support import is_interpreted

collect_ignore_glob = [] if is_interpreted() else ["test_*.py"]

if is_interpreted():  # milliseconds a program
    settings.register_profile("interpreted", deadline=None, derandomize=True, max_examples=25, database=None)
    settings.load_profile("interpreted")


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that were launched."""
    from memcompile.lowering.triton import launch

    names, run = [], launch._launch
    monkeypatch.setattr(
        launch,
        "_launch",
        lambda kernel, *args, **config: names.append(kernel.fn.__name__) or run(kernel, *args, **config),
    )
    return names
