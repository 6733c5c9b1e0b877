"""The command line: `memcompile estimate` says what a sharded memory costs on so many GPUs, and needs none."""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any

from memcompile.cost.groups import candidates
from memcompile.cost.job import CHOICES, Job
from memcompile.cost.report import GIB, as_json, misfit, table
from memcompile.cost.time import Hardware
from memcompile.errors import OptionError
from memcompile.version import __version__

_PIPE_CLOSED = 141  # as a shell says of a program that SIGPIPE ended
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMG]?)", re.IGNORECASE)
_HARDWARE_UNITS = {  # of the options: one of them is so many bytes, bytes a second or seconds
    "gpu_memory": GIB,
    "model_memory": GIB,
    "nvlink": 1e9,
    "network": 1e9,
    "hbm": 1e9,
    "nvlink_latency": 1e-6,
    "network_latency": 1e-6,
}
_DESCRIPTION = """\
Models the training of a table of values that memory layers share, sharded over each of gpus / M groups of M ranks.
Prints for each M the memory of a rank, the bytes that a rank receives in a step and the time of a step, and the best M.
Nothing is run, and no GPU is needed. Every assumption is an option, and is printed.
"""
_EPILOG = """\
examples:
  memcompile estimate --slots 64M --value-dim 2048 --gpus 256
  memcompile estimate --slots 1M --value-dim 1024 --gpus 8 --optimizer row_wise_adagrad --json
  memcompile estimate --slots 64M --value-dim 2048 --gpus 64 --network 25 --plot cost.png

exit codes: 0; 1 where no group size fits the memory of the GPUs; 2 for wrong options.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; wrong options raise SystemExit(2), as argparse does."""
    parser = argparse.ArgumentParser("memcompile", description="A large trainable memory for any Transformer.")
    parser.add_argument("--version", action="version", version=f"memcompile {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    estimate = commands.add_parser(
        "estimate",
        help="what a sharded memory costs on so many GPUs: memory, traffic, time, and the best group size",
        usage="%(prog)s --slots N --value-dim N --gpus N [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_options(estimate)
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["plan"]:
        print(
            "memcompile plan is deprecated, and the next release removes it: use memcompile estimate", file=sys.stderr
        )
        words[0] = "estimate"
    options = parser.parse_args(words)
    try:
        code = _estimate(options)
        sys.stdout.flush()
    except OptionError as error:
        estimate.error(str(error))
    except BrokenPipeError:  # the reader of a pipe, as `| head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout when it ends
        return _PIPE_CLOSED
    return code


def size(text: str) -> int:
    """A number such as 65536, 65,536, 64K or 1.5M, with K = 2**10, M = 2**20 and G = 2**30.

    Raises:
        argparse.ArgumentTypeError: it is none, or not whole.
    """
    match = _SIZE.fullmatch(text.replace(",", "").replace("_", ""))
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a number such as 65536, 64K or 1M (1M = 2**20), got {text!r}")
    number = Fraction(match[1]) * _UNITS[match[2].upper()]
    if number.denominator != 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r} = {float(number):g}")
    return int(number)


def _estimate(options: argparse.Namespace) -> int:
    job = Job(**_of(Job, options))
    given = _of(Hardware, options)
    in_units = {name: round(value * _HARDWARE_UNITS.get(name, 1), 12) for name, value in given.items()}
    hardware = Hardware(**in_units)  # rounded, as 10 * 1e-6 is not 1e-5
    found = candidates(job, hardware)
    if options.plot is not None:
        _draw(job, hardware, found, options.plot)
    if options.json:
        print(json.dumps(as_json(job, hardware, found), indent=2))
    else:
        print(table(job, hardware, found))
    if any(c.fits for c in found):
        return 0
    if options.json:
        print(misfit(job, hardware, found), file=sys.stderr)
    return 1


def _of(kind: type, options: argparse.Namespace) -> dict[str, Any]:
    """The options that are fields of a dataclass."""
    return {f.name: getattr(options, f.name) for f in fields(kind)}


def _draw(job: Job, hardware: Hardware, found: Sequence[Any], path: Path) -> None:
    try:
        from memcompile.cost.plot import draw  # it alone needs matplotlib
    except ImportError as error:
        raise OptionError(f"--plot needs matplotlib: pip install matplotlib ({error})") from error
    try:
        draw(job, hardware, found, path)
    except (OSError, ValueError) as error:
        raise OptionError(f"--plot: {path} cannot be written: {error}") from error


def _add_options(estimate: argparse.ArgumentParser) -> None:
    asked = estimate.add_argument_group("required")
    text = "rows of the table: a perfect square, as 65536, 1M or 64M (K = 2**10, M = 2**20)"
    asked.add_argument("--slots", type=size, required=True, metavar="N", help=text)
    asked.add_argument("--value-dim", type=int, required=True, metavar="N", help="elements of a row")
    asked.add_argument("--gpus", type=int, required=True, metavar="N", help="ranks of the whole job")

    stored = estimate.add_argument_group("the table")
    _choice(stored, "dtype", "of values, gradient and activations")
    _choice(
        stored, "by", "what a rank of a group holds of the table; columns are balanced, whichever slots are hit most"
    )

    layers = estimate.add_argument_group("the layers and their tokens")
    _number(layers, Job, "tokens", "of each rank a step", kind=size)
    _number(layers, Job, "layers", "memory layers that share the table")
    _number(layers, Job, "heads", "queries a token")
    _number(layers, Job, "top_k", "slots that each head reads")
    _number(layers, Job, "key_dim", "width of a query (half of --value-dim)")
    _number(
        layers,
        Job,
        "unique",
        "distinct slots that are hit, as a share of those of uniform hits; for Zipf-like hits 0.15",
        kind=float,
    )
    _number(layers, Job, "skew", "with --by rows: hits of the busiest rank over the mean", kind=float)

    training = estimate.add_argument_group("training")
    _choice(training, "optimizer", "of the values")
    _choice(training, "state_dtype", "of Adam's moments")
    _choice(training, "values_grad", "of the rows that are hit, or of all")
    training.add_argument("--master-weights", action="store_true", help="keep fp32 masters of bf16 values")

    hardware = estimate.add_argument_group("the hardware (by default H100 SXM, 400 Gb/s a GPU)")
    _number(hardware, Hardware, "gpus_per_node", "that NVLink connects")
    _number(hardware, Hardware, "gpu_memory", "GiB of a GPU", kind=float)
    _number(hardware, Hardware, "model_memory", "GiB of it that the rest of the model takes", kind=float)
    _number(hardware, Hardware, "nvlink", "GB/s of a GPU, one direction", kind=float)
    _number(hardware, Hardware, "network", "GB/s of a GPU, one direction", kind=float)
    _number(hardware, Hardware, "hbm", "GB/s of a GPU's memory", kind=float)
    _number(hardware, Hardware, "nvlink_latency", "us that a collective takes at least inside a node", kind=float)
    _number(hardware, Hardware, "network_latency", "us that a collective takes at least between nodes", kind=float)
    _number(hardware, Hardware, "granule", "bytes that a read of GPU memory moves at least")

    output = estimate.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="bytes and seconds, as JSON")
    output.add_argument("--plot", type=Path, metavar="FILE", help="draw time and memory over group sizes and GPUs")


def _number(group: Any, of: type, name: str, text: str, kind: Any = int) -> None:
    """An option for a field of a dataclass, with its default in the option's unit."""
    default: Any = next(f.default for f in fields(of) if f.name == name)
    shown = text
    if default is not None:
        default = round(default / _HARDWARE_UNITS[name], 9) if name in _HARDWARE_UNITS else default
        shown = f"{text} ({default:g})" if isinstance(default, float) else f"{text} ({default})"
    group.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, metavar="N", help=shown)


def _choice(group: Any, name: str, text: str) -> None:
    default = next(f.default for f in fields(Job) if f.name == name)
    group.add_argument(
        f"--{name.replace('_', '-')}", choices=CHOICES[name], default=default, help=f"{text} ({default})"
    )
