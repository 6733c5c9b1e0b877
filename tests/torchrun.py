"""Runs a script under torchrun on this machine, and leaves no process behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import psutil

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 150  # seconds for all starts; a machine that other work shares may need most of it to import torch


class Finished(NamedTuple):
    code: int
    output: str  # of all processes, both streams


def torchrun(*arguments: object, restarts: int = 0, ranks: int = 2, **variables: str) -> Finished:
    """Two ranks by default, of one thread each.

    Raises:
        AssertionError: they did not end in time. They are killed.
    """
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables}
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command = [sys.executable, "-m", "torch.distributed.run", *rendezvous, f"--nproc-per-node={ranks}"]
    command += [f"--max-restarts={restarts}", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, env=environment, cwd=ROOT, text=True, start_new_session=True, **pipes) as agent:
        try:
            output, _ = agent.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            kill_all(agent.pid)
            output, _ = agent.communicate()
            raise AssertionError(f"{arguments} did not end in {TIMEOUT} s:\n{output}") from None
        except BaseException:
            kill_all(agent.pid)
            raise
    return Finished(agent.returncode, output)


def kill_all(agent: int) -> None:
    """A torchrun and its workers, which have sessions of their own."""
    process = psutil.Process(agent)
    for each in [process, *process.children(recursive=True)]:
        each.kill()
