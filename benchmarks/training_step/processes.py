"""The workers as the process that compares them sees them."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from typing import Any

from benchmarks.training_step.cases import Case
from benchmarks.training_step.worker import Facts, Worker


class WorkerError(Exception):
    """A worker that ended; the message is the last that it said."""


class Here:
    """A `Worker` in this process: there at once, but the peak memory is that of all of them."""

    cpu = 0.0  # seconds that are not this process's

    def __init__(self, case: Case) -> None:
        self.case = case

    def facts(self) -> Facts:
        self.worker = Worker(self.case)
        return self.worker.facts

    def turn(self, what: str) -> float:
        return self.worker.turn(what)

    def peak(self) -> float:
        return self.worker.peak()

    def close(self) -> None:
        del self.worker


class Process:
    """A `Worker` in a process of its own. The constructor does not wait until it is ready; `facts` does."""

    def __init__(self, case: Case) -> None:
        self.cpu = 0.0  # seconds of processors that it has taken, as of its last answer
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `close`)
        command = [sys.executable, "-m", "benchmarks.training_step.worker", json.dumps(asdict(case))]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            # Inductor's own processes would share the processors with what is timed.
            env=os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for this process, which ends the others
        )

    def facts(self) -> Facts:
        return Facts(**self._answer())

    def turn(self, what: str) -> float:
        return self._ask(what)

    def peak(self) -> float:
        return self._ask("peak")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def _ask(self, what: str) -> Any:
        assert self._process.stdin
        try:
            self._process.stdin.write(what + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # why it ended is told below
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith('{"answer"'):
                content = json.loads(line)
                self.cpu = content["cpu"]
                return content["answer"]
        code = self._process.wait()
        self._said.seek(0)
        lines = [line for line in self._said.read().splitlines() if line.strip()]
        raise WorkerError("killed: out of memory?" if code == -9 else lines[-1] if lines else f"exit code {code}")
