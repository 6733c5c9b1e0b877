"""Surveys in several processes, with one bar that shows their progress."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import queue

import torch
from tqdm import tqdm

from tests.fuzz.survey import Survey, survey


def run(examples: int, processes: int, seed: int) -> list[Survey]:
    """One survey a process, ``examples`` models in all."""
    context = multiprocessing.get_context("spawn")
    done = context.Queue()
    share = -(-examples // processes)
    with (
        concurrent.futures.ProcessPoolExecutor(processes, context, _start, (done,)) as pool,
        tqdm(total=share * processes, unit=" models", mininterval=2) as bar,
    ):
        running = [pool.submit(_survey, share, seed + i) for i in range(processes)]
        while not all(future.done() for future in running):
            bar.update(_drain(done))
        bar.update(_drain(done))
        return [future.result() for future in running]


def _drain(done: multiprocessing.Queue) -> int:
    """How many models were checked since the last call; waits for one, a second at most."""
    count = 0
    try:
        while True:
            count += done.get(timeout=0 if count else 1)
    except queue.Empty:
        return count


_progress: multiprocessing.Queue


def _start(done: multiprocessing.Queue) -> None:
    global _progress
    _progress = done
    torch.set_num_threads(1)


def _survey(examples: int, seed: int) -> Survey:
    return survey(examples, seed, lambda: _progress.put(1))
