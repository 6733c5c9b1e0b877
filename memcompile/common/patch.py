"""A change of PyTorch that is in force while an object lives that needs it."""

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

_lock = threading.RLock()  # an object may be freed while one is being held, in the same thread


class Change(Protocol):
    """What a patch is made of."""

    def install(self) -> None: ...

    def remove(self) -> None: ...


class Patch:
    """Changes that are made when the first object holds them, and taken back when the last of these is freed."""

    def __init__(self, *changes: Change) -> None:
        self.changes = changes
        self._holders: set[int] = set()
        self._installed = False

    def hold(self, owner: object) -> None:
        """Keeps the changes in force as long as `owner` lives. Idempotent."""
        with _lock:
            if id(owner) in self._holders:
                return
            self._holders.add(id(owner))
            weakref.finalize(owner, self._release, id(owner)).atexit = False
            if not self._installed:
                for change in self.changes:
                    change.install()
                self._installed = True

    def _release(self, owner_id: int) -> None:
        with _lock:
            self._holders.discard(owner_id)
            if self._installed and not self._holders:
                self._installed = False
                for change in reversed(self.changes):
                    change.remove()


class Replaced:
    """Another function in the place of a module's or a class's own: `call(original, *args, **kwargs)`."""

    def __init__(self, owner: Any, name: str, call: Callable[..., Any]) -> None:
        self.owner, self.name, self.call = owner, name, call
        self._original: Callable[..., Any] | None = None
        self._replacement: Callable[..., Any] | None = None
        self._active = False

    def install(self) -> None:
        self._active = True
        original = vars(self.owner)[self.name]
        if self._original is not None and original is not self._original:
            return  # another library has wrapped the replacement

        @functools.wraps(original)
        def switch(*args: Any, **kwargs: Any) -> Any:
            return self.call(original, *args, **kwargs) if self._active else original(*args, **kwargs)

        self._original, self._replacement = original, switch
        setattr(self.owner, self.name, switch)

    def remove(self) -> None:
        self._active = False
        if vars(self.owner)[self.name] is self._replacement:
            setattr(self.owner, self.name, self._original)
            self._original = self._replacement = None
        # Else another library has wrapped the replacement. It stays in there, and does what the original does.
