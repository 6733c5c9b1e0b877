"""The figure is written, whatever fits."""

import pytest

pytest.importorskip("matplotlib")

from memcompile.cost.groups import candidates
from memcompile.cost.job import Job
from memcompile.cost.plot import draw
from memcompile.cost.time import Hardware

JOB = Job(slots=2**26, value_dim=2048, gpus=8)


@pytest.mark.parametrize(
    "hardware",
    [Hardware(), Hardware(gpu_memory=2**21, model_memory=2**20), Hardware(gpus_per_node=6)],
    ids=["some fit", "none fits", "no number of GPUs fills nodes of six"],
)
def test_a_figure_is_written(tmp_path, hardware):
    job = JOB if hardware.gpus_per_node == 8 else Job(slots=2**16, value_dim=64, gpus=6)
    draw(job, hardware, candidates(job, hardware), tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size > 10_000


def test_what_matplotlib_does_not_write_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="Format 'foo' is not supported"):
        draw(JOB, Hardware(), candidates(JOB, Hardware()), tmp_path / "cost.foo")
