"""Nothing is collected here where kernels are not interpreted, and fewer examples are drawn where they are."""

from hypothesis import settings

from memcompile.lowering.triton.settings import is_interpreted

collect_ignore_glob = [] if is_interpreted() else ["test_*.py"]

if is_interpreted():  # milliseconds a program
    settings.register_profile("interpreted", deadline=None, derandomize=True, max_examples=25, database=None)
    settings.load_profile("interpreted")
