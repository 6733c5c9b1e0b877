"""The tag of PyTorch's caches: the sources' digest behind the user's own tag, and a miss where either changes."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from memcompile.lowering.inductor import caches

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


def test_a_tag_is_added_once():
    before = torch.compiler.config.cache_key_tag
    caches.tag_caches()
    assert torch.compiler.config.cache_key_tag == before
    assert before.count("memcompile") == 1
