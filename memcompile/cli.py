"""The command line: `memcompile estimate` says what a sharded memory costs on so many GPUs, and needs none."""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
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
# Of the options: one of them is so many bytes, bytes a second or seconds.
_HARDWARE_UNITS: dict[str, float] = dict.fromkeys(("gpu_memory", "model_memory"), GIB)
_HARDWARE_UNITS |= dict.fromkeys(("nvlink", "network", "hbm"), 1e9)
_HARDWARE_UNITS |= dict.fromkeys(("nvlink_latency", "network_latency"), 1e-6)
_FIELDS = {field.name: field for kind in (Job, Hardware) for field in fields(kind)}
_OPTIONS = {
    "required": {
        "slots": "of a layer, a perfect square: 65536, 1M or 64M (K = 2**10, M = 2**20)",
        "value_dim": "elements of a value",
        "gpus": "ranks of the whole job",
    },
    "the table": {
        "variant": "of the layers; rows of peer have 2 * --value-dim elements",
        "tables": "shared by all layers, or one of --slots for each",
        "dtype": "of values, gradient and activations",
        "by": "what a rank of a group holds of the table (columns; of peer rows); columns balance any hits",
    },
    "the layers and their tokens": {
        "tokens": "of each rank a step",
        "layers": "memory layers",
        "heads": "queries a token",
        "top_k": "slots that each head reads",
        "key_dim": "width of a query (half of --value-dim)",
        "unique": "distinct slots that are hit, as a share of those of uniform hits; for Zipf-like hits 0.15",
        "skew": "with --by rows: hits of the busiest rank over the mean",
    },
    "training": {
        "optimizer": "of the values",
        "state_dtype": "of Adam's moments",
        "values_grad": "of the rows that are hit, or of all",
        "master_weights": "keep fp32 masters of bf16 values",
    },
    "the hardware (by default H100 SXM, 400 Gb/s a GPU)": {
        "gpus_per_node": "that NVLink connects",
        "gpu_memory": "GiB of a GPU",
        "model_memory": "GiB of it that the rest of the model takes",
        "nvlink": "GB/s of a GPU, one direction",
        "network": "GB/s of a GPU, one direction",
        "hbm": "GB/s of a GPU's memory",
        "nvlink_latency": "us that a collective takes at least inside a node",
        "network_latency": "us that a collective takes at least between nodes",
        "granule": "bytes that a read of GPU memory moves at least",
    },
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
    for title, texts in _OPTIONS.items():
        group = estimate.add_argument_group(title)
        for name, text in texts.items():
            group.add_argument(f"--{name.replace('_', '-')}", **_option(_FIELDS[name], text))
    output = estimate.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="bytes and seconds, as JSON")
    output.add_argument("--plot", type=Path, metavar="FILE", help="draw time and memory over group sizes and GPUs")
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
    job = Job(**{field.name: getattr(options, field.name) for field in fields(Job)})
    given = {field.name: getattr(options, field.name) for field in fields(Hardware)}
    in_units = {name: round(value * _HARDWARE_UNITS.get(name, 1), 12) for name, value in given.items()}
    hardware = Hardware(**in_units)  # rounded, as 10 * 1e-6 is not 1e-5
    found = candidates(job, hardware)
    if options.plot is not None:
        try:
            from memcompile.cost.plot import draw  # it alone needs matplotlib

            draw(job, hardware, found, options.plot)
        except ImportError as error:
            raise OptionError(f"--plot needs matplotlib: pip install matplotlib ({error})") from error
        except (OSError, ValueError) as error:
            raise OptionError(f"--plot: {options.plot} cannot be written: {error}") from error
    if options.json:
        print(json.dumps(as_json(job, hardware, found), indent=2))
    else:
        print(table(job, hardware, found))
    if any(c.fits for c in found):
        return 0
    if options.json:
        print(misfit(job, hardware, found), file=sys.stderr)
    return 1


def _option(field: Field, text: str) -> dict[str, Any]:
    """How a field of a dataclass is given: by default with the field's default, in the option's unit."""
    if field.type is bool:
        return {"action": "store_true", "help": text}
    required = field.default is MISSING
    default: Any = None if required else field.default
    if field.name in _HARDWARE_UNITS:
        default = round(default / _HARDWARE_UNITS[field.name], 9)
    if default is not None:
        text += f" ({default:g})" if isinstance(default, float) else f" ({default})"
    option = {"required": required, "default": default, "help": text}
    if field.name in CHOICES:
        return option | {"choices": CHOICES[field.name]}
    kind = size if field.name in ("slots", "tokens") else float if field.type is float else int
    return option | {"type": kind, "metavar": "N"}
