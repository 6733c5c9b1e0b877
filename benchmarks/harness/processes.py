"""Workers: objects in processes of their own, with memory, threads and caches of their own, that answer questions."""

import os
import signal
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, ClassVar

_KILLED_FIRST = Path("/proc/self/oom_score_adj")
_PATIENCE = 2.0  # seconds for a worker to end by itself


class WorkerError(Exception):
    """A worker has ended; the message is what it said last, a traceback where it had one."""


class Local:
    """As `Remote`, in this process: built at the first question, with the memory of the whole process."""

    def __init__(self, build: Callable[..., Any], *arguments: Any) -> None:
        self._build, self._arguments = build, arguments
        self._built: Any = None

    def ask(self, method: str, *arguments: Any) -> Any:
        if self._built is None:
            self._built = self._build(*self._arguments)
        return getattr(self._built, method)(*arguments)

    def close(self) -> None:
        self._built = None


class Remote:
    """`build(*arguments)` in a process of its own, which an error ends. The constructor does not wait for it.

    Attributes:
        seconds: of processors that all workers have taken, as of their last answers.
    """

    seconds: ClassVar[float] = 0.0

    def __init__(
        self, build: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None
    ) -> None:
        context = get_context("spawn")
        self._log = tempfile.NamedTemporaryFile("r", errors="replace")  # noqa: SIM115 (closed by `close`)
        self.connection, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, self._log.name, build, arguments), daemon=True)
        self._taken = 0.0
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process, which ends the workers
        try:
            with environment_variables(environment or {}):
                self._process.start()
        finally:
            signal.signal(signal.SIGINT, handler)
        there.close()  # so that its end is seen

    def ask(self, method: str, *arguments: Any) -> Any:
        self.begin(method, *arguments)
        return self.result()

    def begin(self, method: str, *arguments: Any) -> None:
        """Asks without waiting for the answer."""
        with suppress(OSError):  # it has ended: `result` tells why
            self.connection.send((method, arguments))

    def result(self) -> Any:
        """The answer to what was asked.

        Raises:
            WorkerError: the worker failed or ended.
        """
        try:
            error, content, taken = self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            code, said = self._process.exitcode, [line for line in self._log if line.strip()]
            killed = "killed: out of memory?" if code == -signal.SIGKILL else f"exit code {code}"
            raise WorkerError(killed if code == -signal.SIGKILL or not said else said[-1].strip()) from None
        Remote.seconds += taken - self._taken
        self._taken = taken
        if error is not None:
            raise WorkerError(error)
        return content

    def close(self) -> None:
        self.connection.close()  # which ends it, unless it is at work
        self._process.join(_PATIENCE)
        self._process.kill()
        self._process.join()
        self._log.close()


def ask_all(workers: Sequence[Remote], method: str, *arguments: Any) -> list[Any]:
    """The answers of all, which work at the same time and may wait for each other.

    Raises:
        WorkerError: the first one that failed, with its rank.
    """
    for worker in workers:
        worker.begin(method, *arguments)
    answers: dict[int, Any] = {}
    waiting = {worker.connection: rank for rank, worker in enumerate(workers)}
    while waiting:
        for connection in wait([*waiting]):
            assert isinstance(connection, Connection)
            rank = waiting.pop(connection)
            try:
                answers[rank] = workers[rank].result()
            except WorkerError as error:
                raise WorkerError(f"rank {rank}: {error}") from None
    return [answers[rank] for rank in range(len(workers))]


def fresh_medians(repeats: int, *calls: Callable[[], dict[str, float]]) -> list[dict[str, float]]:
    """The medians of what each call returns, in turns; each time in a new process with empty compile caches."""
    runs: list[list[dict[str, float]]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, found in zip(calls, runs, strict=True):
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
                worker = Remote(partial, call, environment={"TORCHINDUCTOR_CACHE_DIR": cache})
                try:
                    found.append(worker.ask("__call__"))
                finally:
                    worker.close()
    return [{key: statistics.median(run[key] for run in found) for key in found[0]} for found in runs]


@contextmanager
def environment_variables(values: Mapping[str, str]) -> Iterator[None]:
    """Sets them for the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(pipe: Connection, log: str, build: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.dup2(os.open(log, os.O_WRONLY), 2)
    if _KILLED_FIRST.exists():
        _KILLED_FIRST.write_text("1000")  # where memory runs out, this process ends, and the report says so
    try:
        built = build(*arguments)
        while True:
            method, given = pipe.recv()
            pipe.send((None, getattr(built, method)(*given), time.process_time()))
    except EOFError:
        pass  # nothing is asked any more
    except BaseException:
        pipe.send((traceback.format_exc(), None, time.process_time()))
        with suppress(EOFError):
            while True:
                pipe.recv()  # until it is closed: others may still wait for it
