"""Around a run: Ctrl-C that ends it with what was measured so far, and a compile cache of its own."""

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


class Stop:
    """Remembers Ctrl-C: what is being compiled may swallow the exception, or fail in another way."""

    requested = False

    def __call__(self, *_: object) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # once more ends it at once
        raise KeyboardInterrupt

    def check(self) -> None:
        if self.requested:
            raise KeyboardInterrupt


@contextmanager
def interruptible(stop: Stop) -> Iterator[None]:
    """What `stop` was asked for ends the block and no more.

    Inductor's cache is this run's own: Ctrl-C can leave an empty library there, on which every later run would fail.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        handler = signal.signal(signal.SIGINT, stop)
        try:
            yield
        except BaseException:
            if not stop.requested:
                raise
        finally:
            signal.signal(signal.SIGINT, handler)
            if before is None:
                del os.environ["TORCHINDUCTOR_CACHE_DIR"]
            else:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before
