"""What every process does: it builds the layers of all groups that it is in, and runs them in turns with the others."""

import datetime

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from benchmarks.sharding.cases import Case, Sizes
from benchmarks.sharding.traffic import Alone, Received, formulas, received_between, with_formulas
from benchmarks.sharding.trainee import Step, Trainee, timed

WHOLE_STEP = "whole step"
_TIMEOUT = datetime.timedelta(minutes=10)  # of a collective, the turns of other cases included
_WARM_UPS = 2
_STEPS = 3  # whose bytes are counted together


class Rank:
    """One of as many gloo processes on the loopback interface as the largest case has. All are asked the same at the
    same time; those that a case does not have answer None.
    """

    def __init__(self, rank: int, sizes: Sizes, store: str) -> None:
        torch.set_num_threads(1)
        world = sizes.ranks[-1]
        file_store = dist.FileStore(store, world)
        dist.init_process_group("gloo", store=file_store, rank=rank, world_size=world, timeout=_TIMEOUT)
        self._rank, self._sizes = rank, sizes
        self._meshes = {n: DeviceMesh("cpu", torch.arange(n), mesh_dim_names=("memory",)) for n in sizes.ranks}
        self._trainees: dict[tuple[int, str], Trainee] = {}

    def prepare(self, case: Case) -> tuple[dict[str, int], list[Received]] | None:
        """Bytes of memory, and the traffic of each collective and of all of a step."""
        found = None
        if self._rank < case.ranks:
            key = case.ranks, case.by
            if key not in self._trainees:
                self._trainees[key] = Trainee(self._sizes, self._meshes[case.ranks], case.by)
            self._train(case, _WARM_UPS)
            found = self._trainees[key].memory(), self._traffic(case) if case.ranks > 1 else []
        dist.barrier()
        return found

    def step(self, case: Case) -> Step | None:
        """The second of two steps: other cases had the caches before."""
        dist.barrier()
        if self._rank >= case.ranks:
            return None
        trainee = self._trainees[case.ranks, case.by]
        self._train(case, 1)
        dist.barrier(self._meshes[case.ranks].get_group())
        return timed(lambda: trainee.forward_backward(case.tokens), trainee.step)

    def _train(self, case: Case, steps: int) -> None:
        trainee = self._trainees[case.ranks, case.by]
        for _ in range(steps):
            trainee.forward_backward(case.tokens)
            trainee.step()

    def _traffic(self, case: Case) -> list[Received]:
        """Of each collective alone, and of whole steps as they are in training."""
        trainee, group = self._trainees[case.ranks, case.by], self._meshes[case.ranks].get_group()

        def meet() -> None:
            dist.barrier(group)

        with Alone(meet) as alone:
            trainee.forward_backward(case.tokens)
        trainee.step()
        expected = formulas(case, self._sizes, self._rank)
        before = received_between(meet)
        self._train(case, _STEPS)
        measured = (received_between(meet) - before) / _STEPS
        whole = Received(WHOLE_STEP, "", sum(c.received_bytes for c in expected), measured)
        return [*with_formulas(expected, alone.found), whole]
