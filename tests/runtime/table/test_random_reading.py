"""The invariant of `runtime.table.current_values`: whoever reads or writes the table or its gradient between steps, in
whatever way, sees what dense training has there.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel

from memcompile.runtime.pool import pool_of
from tests.planned import batch, plain_attention
from tests.runtime.table.stepping import evaluate, snapshot, stored_values
from tests.runtime.table.test_random_training import Loop

READS = """parameter kept_alias kept_view kept_state_dict compiled_model compiled_penalty functional_call
    functional_call_of_a_clone averaged_model average_by_hand deep_copy pickled saved_parameter thread a_step_with_hooks
    vector numpy optimizer_state""".split()
WRITES = "clamp scale_data lookahead swap_weights assign_rows draw assign_vector".split()
GRADIENTS = "look scale noise clip_by_value assign all_finite mask view".split()


class Reader(Loop):
    """A training that is read, and written, between its steps."""

    def __init__(self, values_grad: str, values_lr: float | None, sgd: bool) -> None:
        super().__init__(values_grad, values_lr, sgd)
        values = self.model.memory_values
        self.alias, self.view, self.state_dict = values.detach(), values.data[5:9], self.model.state_dict()
        self.average = AveragedModel(self.model)
        self.slow = [p.detach().clone() for p in self.model.parameters()]
        self.compiled = torch.compile(self.model, backend="eager", fullgraph=True)
        self.penalty = torch.compile(lambda: self.model.memory_values.square().sum(1), backend="eager", fullgraph=True)

    # --- reads ---------------------------------------------------------------------------------------------------

    def read(self, how: str) -> None:
        with torch.no_grad(), plain_attention():
            found = getattr(self, how)()
        if found is not None:
            self.seen.append(torch.as_tensor(found).detach().clone())

    def parameter(self) -> Tensor:
        return self.model.memory_values.square().sum(1)

    def kept_alias(self) -> Tensor:
        return self.alias

    def kept_view(self) -> Tensor:
        return self.view.sum(1)

    def kept_state_dict(self) -> Tensor:
        return self.state_dict["memory_values"]

    def compiled_model(self) -> Tensor:
        return self.compiled(batch(99)[0])

    def compiled_penalty(self) -> Tensor:
        return self.penalty()

    def functional_call(self) -> Tensor:
        return functional_call(
            self.model, {name: p.detach() for name, p in self.model.named_parameters()}, batch(99)[:1]
        )

    def functional_call_of_a_clone(self) -> Tensor:
        parameters = {name: 0.5 * p for name, p in self.model.named_parameters()}
        return functional_call(self.model, parameters, batch(99)[:1])

    def averaged_model(self) -> Tensor:
        self.average.update_parameters(self.model)
        return evaluate(self.average)

    def average_by_hand(self) -> Tensor:
        torch._foreach_lerp_(self.slow, [*self.model.parameters()], 0.1)
        return self.slow[0].clone()

    def deep_copy(self) -> Tensor:
        return evaluate(copy.deepcopy(self.model))

    def pickled(self) -> Tensor:
        return evaluate(pickle.loads(pickle.dumps(self.model)))

    def saved_parameter(self) -> Tensor:
        file = io.BytesIO()
        torch.save([self.model.memory_values, self.alias], file)
        file.seek(0)
        parameter, alias = torch.load(file)
        assert type(parameter) is nn.Parameter and type(alias) is Tensor
        return parameter + alias

    def thread(self) -> Tensor:
        found: list[Tensor] = []
        thread = threading.Thread(target=lambda: found.extend([evaluate(self.model), self.model.memory_values.mean(0)]))
        thread.start()
        thread.join()
        return torch.cat([each.flatten() for each in found])

    def a_step_with_hooks(self) -> None:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            self.step()

    def vector(self) -> Tensor:
        return parameters_to_vector(self.model.parameters())

    def numpy(self) -> Tensor:
        return self.model.memory_values.detach().numpy().sum(0)

    def optimizer_state(self) -> Tensor | None:
        states = self.optimizer.state_dict()["state"]
        return states[0]["exp_avg_sq"] if "exp_avg_sq" in states.get(0, {}) else None

    # --- writes --------------------------------------------------------------------------------------------------

    def clamp(self) -> None:
        for p in self.model.parameters():
            p.clamp_(-0.2, 0.2)

    def scale_data(self) -> None:
        for p in self.model.parameters():
            p.data.mul_(0.9)

    def lookahead(self) -> None:
        for p, slow in zip(self.model.parameters(), self.slow, strict=True):
            slow.lerp_(p, 0.5)
            p.copy_(slow)

    def swap_weights(self) -> None:
        for p, slow in zip(self.model.parameters(), self.slow, strict=True):
            p.data, slow.data = slow.data.clone(), p.data.clone()
        self.alias, self.view = self.model.memory_values.detach(), self.model.memory_values.data[5:9]
        self.state_dict = self.model.state_dict()

    def assign_rows(self) -> None:
        self.model.memory_values[3:7] = 0.1

    def draw(self) -> None:
        torch.manual_seed(self.batch)
        nn.init.normal_(self.model.memory_values, std=0.1)

    def assign_vector(self) -> None:
        vector_to_parameters(0.9 * parameters_to_vector(self.model.parameters()), self.model.parameters())
        self.swap_weights()

    # --- gradients -----------------------------------------------------------------------------------------------

    def with_gradient(self, how: str) -> None:
        """A step of a gradient that the loop looks at, or changes, first."""
        self.optimizer.zero_grad()
        self.backward()
        with torch.no_grad():
            for p in self.model.parameters():
                getattr(self, f"gradient_{how}")(p.grad)
        self.optimizer.step()

    def gradient_look(self, grad: Tensor) -> None:
        self.seen.append(torch.stack([grad.abs().max(), grad.std(), grad.flatten().norm(), grad.mean(-1).norm()]))

    def gradient_scale(self, grad: Tensor) -> None:
        grad.data /= 2

    def gradient_noise(self, grad: Tensor) -> None:
        torch.manual_seed(self.batch)
        grad.add_(torch.randn_like(grad), alpha=0.01)

    def gradient_clip_by_value(self, grad: Tensor) -> None:
        grad.clamp_(-1e-3, 1e-3)

    def gradient_assign(self, grad: Tensor) -> None:
        grad[0] = 0.01

    def gradient_all_finite(self, grad: Tensor) -> None:
        assert torch.isfinite(grad).all()

    def gradient_mask(self, grad: Tensor) -> None:
        grad.mul_((grad > 0).to(grad.dtype))

    def gradient_view(self, grad: Tensor) -> None:
        grad.view(-1)[::2].zero_()


def run(loop: Reader, action: str) -> None:
    if action in GRADIENTS:
        loop.with_gradient(action)
    elif action in READS or action in WRITES:
        loop.read(action)
    else:
        getattr(loop, action)()


def assert_as_dense(actions: list[str], values_lr: float | None = None, sgd: bool = False) -> None:
    loops = [Reader(values_grad, values_lr, sgd) for values_grad in ("sparse", "dense")]
    for loop in loops:
        for action in [*actions, "evaluate"]:
            run(loop, action)
    sparse, dense = ((loop.seen, snapshot(loop.model)) for loop in loops)
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-9)


@pytest.mark.parametrize("read", READS)
def test_a_read_between_steps(read):
    assert_as_dense(["step", "step", read, "step", read, "step"])


@pytest.mark.parametrize("write", WRITES)
def test_a_write_between_steps(write):
    assert_as_dense(["step", "step", write, "step", "step", write])


@pytest.mark.parametrize("change", GRADIENTS)
def test_a_gradient_that_a_loop_looks_at_or_changes(change):
    assert_as_dense(["step", change, "accumulate", change, "step"])


def test_rows_have_missed_steps_when_they_are_read():
    loop = Reader("sparse", None, False)
    loop.step()
    loop.step()
    before = stored_values(loop.model)
    assert not torch.equal(before, loop.model.memory_values)
    assert (pool_of(loop.model).table.row_state(loop.model.memory_values)[1] == 2).all()


@settings(deadline=None, max_examples=12, derandomize=True, database=None)
@given(
    actions=st.lists(
        st.one_of(st.just("step"), st.sampled_from([*READS, *WRITES, *GRADIENTS, "save", "load", "evaluate"])),
        min_size=4,
        max_size=14,
    ),
    values_lr=st.sampled_from([None, 2e-3]),
    sgd=st.booleans(),
)
def test_any_sequence_of_steps_reads_and_writes(actions, values_lr, sgd):
    torch._dynamo.reset()
    assert_as_dense(actions, values_lr, sgd)
