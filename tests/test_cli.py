"""`memcompile estimate` as a user types it: sizes, defaults, exit codes, and errors that name the option."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import memcompile
from memcompile.cli import main, size
from memcompile.cost.job import Job
from memcompile.cost.time import Hardware

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["estimate", "--slots", "1M", "--value-dim", "64", "--gpus", "8"]
LARGE = ["estimate", "--slots", "64M", "--value-dim", "2048", "--gpus", "256"]


def run(arguments, capsys):
    code = main(arguments)
    return code, capsys.readouterr()


def refused(arguments, capsys):
    """What a wrong command prints; it leaves with 2 and prints nothing else."""
    with pytest.raises(SystemExit) as left:
        main(arguments)
    captured = capsys.readouterr()
    assert left.value.code == 2 and not captured.out
    return captured.err


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("65536", 2**16),
        ("65,536", 2**16),
        ("65_536", 2**16),
        ("64K", 2**16),
        ("64k", 2**16),
        ("1M", 2**20),
        ("64M", 2**26),
        ("0.25M", 2**18),
        ("1G", 2**30),
    ],
)
def test_sizes(text, number):
    assert size(text) == number


@pytest.mark.parametrize("text", ["", "M", "1T", "1MB", "-4", "1e6", "1 M", "0x10", ".5M"])
def test_what_is_no_size(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a number such as 65536, 64K or 1M"):
        size(text)


def test_sizes_are_whole():
    with pytest.raises(argparse.ArgumentTypeError, match=r"expected a whole number, got '1.3' = 1.3"):
        size("1.3")


def test_the_table(capsys):
    code, printed = run(LARGE, capsys)
    assert code == 0 and not printed.err
    for text in ("67,108,864 slots (8,192 half-keys a side) x 2,048 in bf16", "* the best", "all_gather", "assumed"):
        assert text in printed.out


def test_defaults_are_those_of_the_classes(capsys):
    code, printed = run([*SMALL, "--json"], capsys)
    content = json.loads(printed.out)
    assert code == 0
    assert Job(**content["job"]) == Job(slots=2**20, value_dim=64, gpus=8)
    assert Hardware(**content["hardware"]) == Hardware()


def test_every_assumption_is_an_option(capsys):
    given = {
        "--dtype": "fp32",
        "--by": "rows",
        "--variant": "peer",
        "--tables": "separate",
        "--tokens": "2K",
        "--layers": "2",
        "--heads": "8",
        "--top-k": "16",
        "--key-dim": "128",
        "--unique": "0.15",
        "--skew": "2",
        "--optimizer": "lazy_adam",
        "--state-dtype": "bf16",
        "--values-grad": "dense",
        "--gpus-per-node": "4",
        "--gpu-memory": "141",
        "--model-memory": "10",
        "--nvlink": "300",
        "--network": "25",
        "--hbm": "4800",
        "--nvlink-latency": "5",
        "--network-latency": "50",
        "--granule": "32",
    }
    words = [word for option in given.items() for word in option]
    _, printed = run([*SMALL, *words, "--master-weights", "--json"], capsys)
    content = json.loads(printed.out)
    assert Job(**content["job"]) == Job(
        slots=2**20,
        value_dim=64,
        gpus=8,
        variant="peer",
        tables="separate",
        tokens=2048,
        layers=2,
        heads=8,
        top_k=16,
        key_dim=128,
        dtype="fp32",
        optimizer="lazy_adam",
        state_dtype="bf16",
        master_weights=True,
        values_grad="dense",
        by="rows",
        unique=0.15,
        skew=2.0,
    )
    hardware = Hardware(**content["hardware"])
    assert (hardware.gpus_per_node, hardware.gpu_memory, hardware.model_memory) == (4, 141 * 2**30, 10 * 2**30)
    assert (hardware.nvlink, hardware.network, hardware.hbm) == (300e9, 25e9, 4800e9)
    assert (hardware.nvlink_latency, hardware.network_latency) == pytest.approx((5e-6, 50e-6))
    assert hardware.granule == 32
    options = {option.removeprefix("--").replace("-", "_") for option in given} | {"slots", "value_dim", "gpus"}
    assert options | {"master_weights"} == {f.name for kind in (Job, Hardware) for f in fields(kind)}


def test_pairs_are_sharded_by_rows(capsys):
    code, printed = run([*SMALL, "--variant", "peer"], capsys)
    assert code == 0 and "gradient, by rows;" in printed.out
    assert "shard by rows (--by rows)" in refused([*SMALL, "--variant", "peer", "--by", "columns"], capsys)


def test_what_does_not_fit_exits_with_1(capsys):
    code, printed = run([*LARGE, "--gpus", "8"], capsys)
    assert code == 1 and not printed.err
    assert "does not fit: groups of 8" in printed.out and "--gpus 32" in printed.out


def test_what_does_not_fit_says_so_beside_json(capsys):
    code, printed = run([*LARGE, "--gpus", "8", "--json"], capsys)
    assert code == 1 and "does not fit: groups of 8" in printed.err
    assert json.loads(printed.out)["best"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["estimate"], "the following arguments are required: --slots, --value-dim, --gpus"),
        (
            [*SMALL, "--slots", "1000"],
            "slots must be a perfect square, n_keys**2; got 1,000, the nearest are 961 (31**2)",
        ),
        ([*SMALL, "--slots", "many"], "argument --slots: expected a number such as 65536, 64K or 1M"),
        ([*SMALL, "--gpus", "12"], "gpus=12 do not fill nodes of gpus_per_node=8: use 8 or 16 GPUs"),
        ([*SMALL, "--gpus", "0"], "gpus must be at least 1, got 0"),
        ([*SMALL, "--hbm", "-1"], "hbm must be positive"),
        ([*SMALL, "--hbm", "fast"], "argument --hbm: invalid float value: 'fast'"),
        ([*SMALL, "--optimizer", "lion"], "argument --optimizer: invalid choice: 'lion'"),
        ([*SMALL, "--model-memory", "80"], "model_memory must be below gpu_memory, got 80 of 80 GiB"),
        ([*SMALL, "--optim", "sgd"], "unrecognized arguments: --optim sgd"),
        ([*SMALL, "--plot", "cost.foo"], "--plot: cost.foo cannot be written: Format 'foo' is not supported"),
        ([*SMALL, "--plot", "no/such/folder/cost.png"], "--plot: no/such/folder/cost.png cannot be written"),
    ],
    ids=lambda v: " ".join(v[-2:]) if isinstance(v, list) else "",
)
def test_wrong_options_are_errors_that_name_them(arguments, message, capsys):
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    assert message in refused(arguments, capsys)


def test_a_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    code, printed = run([*SMALL, "--plot", str(tmp_path / "cost.png")], capsys)
    assert code == 0 and "the best" in printed.out
    assert (tmp_path / "cost.png").stat().st_size > 10_000


def test_a_plot_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "memcompile.cost.plot", raising=False)
    assert "--plot needs matplotlib: pip install matplotlib" in refused([*SMALL, "--plot", "cost.png"], capsys)


@pytest.mark.parametrize("arguments", [["--help"], ["estimate", "--help"]])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    text = capsys.readouterr().out
    assert left.value.code == 0 and "estimate" in text
    if len(arguments) == 2:
        for option in ("--slots", "--value-dim", "--gpus", "--unique", "--network-latency", "--plot", "exit codes"):
            assert option in text


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0 and capsys.readouterr().out == f"memcompile {memcompile.__version__}\n"


def in_a_process(*arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def test_a_reader_that_has_read_enough():
    command = [sys.executable, "-m", "memcompile", *SMALL, "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_the_former_word_works_and_says_the_new_one(capsys):
    expected = run(SMALL, capsys)[1].out
    code, printed = run(["plan", *SMALL[1:]], capsys)
    assert (code, printed.out) == (0, expected)
    assert printed.err == "memcompile plan is deprecated, and the next release removes it: use memcompile estimate\n"
    assert "usage: memcompile estimate" in refused(["plan", "--slots", "1M"], capsys)
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "plan" not in capsys.readouterr().out


def test_as_a_module():
    done = in_a_process("-m", "memcompile", *SMALL)
    assert done.returncode == 0 and "* the best" in done.stdout
    wrong = in_a_process("-m", "memcompile", *SMALL, "--slots", "1000")
    assert wrong.returncode == 2 and wrong.stderr.startswith("usage: memcompile estimate")


def test_the_package_does_not_import_it_and_it_does_not_import_matplotlib():
    script = """
import sys
import memcompile
assert not [name for name in sys.modules if name.startswith(("memcompile.cost", "memcompile.cli"))]
import memcompile.cli
assert "matplotlib" not in sys.modules
"""
    done = in_a_process("-c", script)
    assert done.returncode == 0, done.stderr
