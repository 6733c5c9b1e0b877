"""The tag of PyTorch's caches: the sources' digest behind the user's own tag, and a miss where either changes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memcompile.lowering import memory_lookup
from memcompile.lowering.inductor import caches
from memcompile.version import __version__

ROOT = Path(__file__).parents[3]

# Plain Inductor, which has none of our passes.
PROGRAM = """
import torch
from torch._dynamo.utils import counters
from memcompile.lowering import memory_lookup

tensors = [torch.ones(s) for s in ((5, 12), (12, 12), (12,), (2, 2, 7, 3), (49, 10))]
torch.compile(lambda *t: memory_lookup(*t, heads=2, top_k=4), fullgraph=True)(*tensors)
hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
print("hit" if hits else "miss", torch.compiler.config.cache_key_tag)
"""


def test_the_digest_follows_every_source_file(tmp_path, monkeypatch):
    (tmp_path / "cpu").mkdir()
    source, kernel = tmp_path / "op.py", tmp_path / "cpu" / "kernel.cpp"
    monkeypatch.setattr(caches, "__file__", str(source))

    def digest() -> str:
        caches.source_digest.cache_clear()
        return caches.source_digest()

    source.write_text("a")
    kernel.write_text("b")
    seen = {digest()}
    assert digest() in seen
    for path, text in ((source, "c"), (kernel, "d"), (tmp_path / "new.py", "")):
        path.write_text(text)
        assert digest() not in seen
        seen.add(digest())
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "op.pyc").write_text("e")
    assert digest() in seen
    caches.source_digest.cache_clear()


def test_a_changed_source_misses_under_plain_inductor(tmp_path):
    def run(version: str, tag: str) -> list[str]:
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
            "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
            "TORCH_COMPILE_CACHE_KEY_TAG": tag,
            "PYTHONPATH": str(ROOT),
        }
        # The version's file alone: importing the package would tag the caches before the change.
        program = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("memcompile.version", {str(ROOT / "memcompile" / "version.py")!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.__version__ = {version!r}
sys.modules["memcompile.version"] = module
{PROGRAM}"""
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    first, *tag = run("1", "mine")
    assert first == "miss" and tag == ["mine", "memcompile", "1", caches.source_digest()]
    assert [run(*of)[0] for of in (("1", "mine"), ("2", "mine"))] == ["hit", "miss"]


@pytest.fixture
def tag(monkeypatch):
    """The tag, with a user's own alone to start with."""
    monkeypatch.setattr(caches, "_traced_alone", False)
    with torch.compiler.config.patch(cache_key_tag="mine"):
        yield lambda: torch.compiler.config.cache_key_tag.split()


def test_a_tag_is_added_once_and_taken_out(tag):
    for _ in range(2):
        caches.tag_caches()
        assert tag() == ["mine", "memcompile", __version__, caches.source_digest()]
    torch.compiler.config.cache_key_tag += " later"
    for _ in range(2):
        caches.untag_caches()
        assert tag() == ["mine", "later"]


def lookup_on_fakes():
    with FakeTensorMode():
        tensors = [torch.ones(s) for s in ((5, 12), (12, 12), (12,), (2, 2, 7, 3), (49, 10))]
        memory_lookup(*tensors, heads=2, top_k=4)


@pytest.mark.parametrize("planned", [False, True])
def test_the_tag_of_what_is_traced_stays_where_no_planned_model_has_it(tag, planned):
    """A rewritten graph has operators, and no planned model to take the tag out when it is gone."""
    if planned:
        caches.tag_caches()
    lookup_on_fakes()
    assert "memcompile" in tag()
    caches.untag_caches()
    assert ("memcompile" in tag()) is not planned


def test_what_is_run_and_not_traced_tags_nothing(tag):
    for device in ("cpu", "meta"):
        tensors = [torch.ones(s, device=device) for s in ((5, 12), (12, 12), (12,), (2, 2, 7, 3), (49, 10))]
        memory_lookup(*tensors, heads=2, top_k=4)
    assert tag() == ["mine"]
