"""Builds the C++ kernels once for each compiler, instruction set and PyTorch, and keeps them in a cache on disk."""

import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "src"
INCLUDE = Path(torch.__file__).parent / "include"
FLAGS = ("-std=c++20", "-O3", "-fno-math-errno", f"-I{SOURCES}", "-isystem", str(INCLUDE))
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # of torch 2.11, the oldest that is supported


class BuildError(Exception):
    """The kernels cannot be built here; the message says why, and what would help."""


def cache_directory() -> Path:
    """``MEMCOMPILE_CACHE_DIR``, or ``memcompile`` in the user's cache directory.

    Raises:
        BuildError: there is neither.
    """
    if given := os.environ.get("MEMCOMPILE_CACHE_DIR"):
        return Path(given)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "memcompile"
    try:
        return Path.home() / ".cache" / "memcompile"
    except RuntimeError as error:
        raise BuildError("the user has no home directory: set MEMCOMPILE_CACHE_DIR") from error


def compiler() -> list[str]:
    """The command of ``CXX``, or the first of g++, clang++ and c++ on the path.

    Raises:
        BuildError: there is none.
    """
    given = os.environ.get("CXX")
    candidates = [shlex.split(given)] if given else [["g++"], ["clang++"], ["c++"]]
    for command in candidates:
        if command and shutil.which(command[0]):
            return command
    tried = " or ".join(command[0] for command in candidates if command)
    raise BuildError(f"no C++ compiler ({tried}): install g++, or set CXX")


def kernels() -> Path:
    """Path of the library with the kernels, which registers them when it is loaded. Built where it is not there yet:
    about ten seconds. Two processes may ask at once.

    Raises:
        BuildError: no compiler, a compiler that fails, or no directory to write to.
    """
    linked = [f"-L{INCLUDE.parent / 'lib'}", "-ltorch_cpu"]
    if platform.system() == "Darwin":
        linked = ["-undefined", "dynamic_lookup"]
    return build(SOURCES / "bindings.cpp", [STABLE_ABI, *linked], torch.__version__)


def build(source: Path, flags: Sequence[str], key: str = "") -> Path:
    """Path of the shared library that ``source`` becomes with ``flags``, from the cache where it is there.

    Args:
        source: a C++ file; it may include files beside it and those of `SOURCES`.
        key: what else the result depends on.

    Raises:
        BuildError: as `kernels`.
    """
    architecture = os.environ.get("MEMCOMPILE_CPU_ARCH") or "native"  # the processor that this runs on
    flag = "-mcpu" if platform.machine() in ("arm64", "aarch64") else "-march"
    command = [*compiler(), f"{flag}={architecture}", *FLAGS]
    # The predefined macros name the compiler's version and the instruction sets that "native" stands for.
    macros = _run([*command, "-dM", "-E", "-x", "c++", os.devnull], "is MEMCOMPILE_CPU_ARCH one that it knows?")
    command += ["-fPIC", "-shared", "-fvisibility=hidden"]
    digest = hashlib.sha256("\0".join([macros, key, source.name, *command, *flags]).encode())
    for path in sorted({*SOURCES.rglob("*.*"), *source.parent.glob("*.h"), source}):
        digest.update(path.read_bytes())
    target = cache_directory() / f"{source.stem}-{digest.hexdigest()[:24]}.so"
    try:
        if _is_whole(target):
            return target
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _check_ours(target.parent, is_directory=True)
        with FileLock(target.with_suffix(".lock")):
            if not _is_whole(target):
                # A warning, so that who waits sees why: nothing else is shown by default.
                log.warning("building %s for this machine with %s, once: about ten seconds", source.name, command[0])
                with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                    made = Path(scratch) / target.name
                    _run([*command, str(source), "-o", str(made), *flags])
                    made.chmod(0o755)
                    sum_of_it = Path(scratch) / "sum"
                    sum_of_it.write_text(_sha256(made))
                    sum_of_it.chmod(0o644)
                    os.replace(made, target)  # another process finds all of it, or nothing
                    os.replace(sum_of_it, target.with_suffix(".sha256"))
    except OSError as error:
        raise BuildError(f"{target.parent} cannot be written ({error}): set MEMCOMPILE_CACHE_DIR") from error
    return target


def _is_whole(library: Path) -> bool:
    """Whether a library is in the cache as it was built: one that was cut off would end the process when it is loaded.

    Raises:
        BuildError: it, its checksum or their directory is another user's, or one that others may write to.
    """
    if not library.exists():
        return False
    checksum = library.with_suffix(".sha256")
    _check_ours(library.parent, is_directory=True)
    _check_ours(library)
    if not os.path.lexists(checksum):
        return False
    _check_ours(checksum)
    return checksum.read_text(errors="replace") == _sha256(library)


def _check_ours(path: Path, is_directory: bool = False) -> None:
    """Raises BuildError unless others can neither write a directory or file of the cache, nor have made it. What is
    loaded from there runs as this user.
    """
    if not hasattr(os, "getuid"):
        return  # Windows has access control lists instead
    found = path.stat() if is_directory else path.lstat()  # a linked directory is the user's choice
    problem = None
    if found.st_uid not in (0, os.getuid()):
        problem = f"belongs to the user {found.st_uid}"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        problem = "may be written by other users"
    elif not is_directory and not stat.S_ISREG(found.st_mode):
        problem = "is no file"
    if problem is not None:
        raise BuildError(
            f"{path} {problem}, and is not loaded: set MEMCOMPILE_CACHE_DIR to a directory that you alone can write to"
        )


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _run(command: Sequence[str], hint: str = "") -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{command[0]} does not run ({error})") from error
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
        raise BuildError(f"{shlex.join(command)} failed: {' | '.join([*said[:3], hint]).rstrip(' |')}")
    return done.stdout
