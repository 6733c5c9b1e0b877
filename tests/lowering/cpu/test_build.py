"""The kernels' build: once, whole or not at all, by whoever comes first, and a sentence where it cannot be."""

import concurrent.futures
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from memcompile.lowering.cpu import build
from memcompile.lowering.cpu.build import BuildError

ROOT = Path(__file__).parents[3]
SOURCE = '#include "kernels/simd.h"\nextern "C" int answer() { return memcompile::kVectorBytes; }\n'


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMCOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    file = tmp_path / "source" / "answer.cpp"
    file.parent.mkdir()
    file.write_text(SOURCE)
    return file


def libraries(tmp_path):
    return sorted((tmp_path / "cache").glob("*.so"))


def test_built_once_and_said_once(source, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "memcompile"):
        first = build.build(source, [])
        assert build.build(source, []) == first
    assert libraries(tmp_path) == [first]
    name = build.compiler()[0]
    said = f"building answer.cpp for this machine with {name}, once: about ten seconds"
    assert [record.message for record in caplog.records] == [said]


@pytest.mark.parametrize("change", ["source", "flags", "key", "architecture", "command"])
def test_what_the_result_depends_on_is_in_its_name(source, change, monkeypatch):
    before = build.build(source, [])
    if change == "source":
        source.write_text(SOURCE + "// another\n")
    if change == "architecture":
        monkeypatch.setenv("MEMCOMPILE_CPU_ARCH", "x86-64" if "x86" in os.uname().machine else "generic")
    if change == "command":
        monkeypatch.setenv("CXX", f"{build.compiler()[0]} -ffp-contract=off")
    after = build.build(source, ["-DX"] if change == "flags" else [], "another" if change == "key" else "")
    assert after != before


def test_two_processes_at_once(source, tmp_path):
    program = f"""
from pathlib import Path
from memcompile.lowering.cpu.build import build
print(build(Path({str(source)!r}), []))
"""

    def run(_):
        return subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, range(2))
    assert first == second
    assert [str(path) for path in libraries(tmp_path)] == [first.strip()]
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]  # no scratch is left behind


def test_a_directory_that_holds_it_need_not_be_written(source, tmp_path, monkeypatch):
    built = build.build(source, [])
    monkeypatch.setattr(build, "FileLock", None)  # would raise
    assert build.build(source, []) == built


def test_a_library_that_was_cut_off_is_built_again(source, caplog):
    """It would end the process by SIGBUS when it is loaded. So is one whose checksum was not written."""
    built = build.build(source, [])
    whole = built.read_bytes()
    with built.open("r+b") as file:
        file.truncate(100)
    assert build.build(source, []) == built and built.read_bytes()[:100] == whole[:100]
    assert len(built.read_bytes()) == len(whole)
    built.with_suffix(".sha256").unlink()
    assert build.build(source, []) == built
    assert sum("building" in record.message for record in caplog.records) == 3


def plant_writable_directory(built, other):
    built.parent.chmod(0o777)


def plant_writable_library(built, other):
    built.chmod(0o775)


def plant_writable_checksum(built, other):
    built.with_suffix(".sha256").chmod(0o666)


def plant_link(built, other):
    """To a library elsewhere, which has the right checksum."""
    built.rename(other)
    built.symlink_to(other)


def plant_directory(built, other):
    built.unlink()
    built.mkdir()


def plant_directory_of_another_user(built, other):
    os.chown(built.parent, 65534, -1)


def plant_library_of_another_user(built, other):
    os.chown(built, 65534, -1)


PLANTS = {
    plant_writable_directory: "cache may be written by other users",
    plant_writable_library: r"\.so may be written by other users",
    plant_writable_checksum: r"\.sha256 may be written by other users",
    plant_link: r"\.so (is no file|may be written by other users)",
    plant_directory: r"\.so is no file",
    plant_directory_of_another_user: "cache belongs to the user 65534",
    plant_library_of_another_user: r"\.so belongs to the user 65534",
}


@pytest.mark.parametrize("plant", PLANTS)
def test_what_others_may_have_written_is_not_loaded(plant, source, tmp_path):
    if plant.__name__.endswith("user") and os.getuid() != 0:
        pytest.skip("root alone can give files away")
    built = build.build(source, [])
    plant(built, tmp_path / "other.so")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        BuildError, match=f"{PLANTS[plant]}, and is not loaded: set MEMCOMPILE_CACHE_DIR to a directory"
    ):
        build.build(source, [])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_new_directory_is_the_users_alone(source, tmp_path):
    before = os.umask(0o002)  # of systems where each user has a group
    try:
        built = build.build(source, [])
        assert build.build(source, []) == built
    finally:
        os.umask(before)
    assert stat.S_IMODE(built.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(built.stat().st_mode) == 0o755


def test_no_home(source, monkeypatch):
    for name in ("MEMCOMPILE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(build.Path, "home", no_home)
    with pytest.raises(BuildError, match="no home directory: set MEMCOMPILE_CACHE_DIR"):
        build.build(source, [])


def test_no_compiler(source, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        BuildError, match=r"no C\+\+ compiler \(g\+\+ or clang\+\+ or c\+\+\): install g\+\+, or set CXX"
    ):
        build.build(source, [])


def test_a_compiler_that_fails(source, tmp_path):
    source.write_text("#error of its own\n")
    with pytest.raises(BuildError, match=r"failed: .*error.* of its own"):
        build.build(source, [])
    assert not libraries(tmp_path)


def test_a_compiler_that_is_none(source, tmp_path, monkeypatch):
    broken = tmp_path / "compiler"
    broken.write_text("not a program")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(BuildError, match="does not run"):
        build.build(source, [])


def test_a_directory_that_cannot_be_written(source, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEMCOMPILE_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(BuildError, match=r"cannot be written .*set MEMCOMPILE_CACHE_DIR"):
        build.build(source, [])


def test_the_command_of_cxx_may_have_arguments(source, monkeypatch):
    monkeypatch.setenv("CXX", "g++ -DEXTRA")
    assert build.compiler() == ["g++", "-DEXTRA"]
    assert build.build(source, []).exists()


WITHOUT = """
import logging
logging.basicConfig(format="%(levelname)s %(message)s")
import torch
from memcompile.lowering import cpu, operator
values, slots, weights = torch.randn(7, 5), torch.tensor([[1, 6]]), torch.tensor([[2.0, 3.0]])
for _ in range(2):
    y = operator("weighted_gather")(values, slots, weights)
torch.testing.assert_close(y, 2 * values[1:2] + 3 * values[6:7])
print(cpu.load(), torch._C._dispatch_has_kernel_for_dispatch_key("memcompile::weighted_gather", "CPU"))
"""


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("CXX", "no-such-compiler", r"no C++ compiler (no-such-compiler): install g++, or set CXX"),
        ("MEMCOMPILE_CPU_ARCH", "bogus", "is MEMCOMPILE_CPU_ARCH one that it knows?"),
        ("MEMCOMPILE_CPU_KERNELS", "off", "MEMCOMPILE_CPU_KERNELS=off: memory layers run as PyTorch operators"),
    ],
)
def test_without_them_the_operators_run_and_it_is_said_once(variable, value, said, tmp_path):
    environment = os.environ | {variable: value, "MEMCOMPILE_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "False"]
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert said in warnings[0]
    assert "slower" in warnings[0]


FIRST_USE = """
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from memcompile.lowering import operator
values, slots, weights = torch.randn(7, 5), torch.tensor([[1, 6]]), torch.tensor([[2.0, 3.0]])
make_fx(operator("weighted_gather"), pre_dispatch=True)(values, slots, weights)
"""


def test_the_first_use_may_be_while_tracing():
    """When PyTorch's Python dispatcher has already chosen the kernel that runs where there is no other."""
    subprocess.run([sys.executable, "-c", FIRST_USE], check=True, cwd=ROOT)
