"""Writes a model as Python source that stands alone, ready to be pasted into a test, with the truth about its FFNs."""

from __future__ import annotations

import dataclasses

from tests.fuzz.ffn_source import Scope, Sizes, Written, write_ffn, write_sequential
from tests.fuzz.misses import MISSES, Miss
from tests.fuzz.spec import Block, Model

VOCABULARY = 11
_IMPORTS = """import functools
import threading

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
"""
_RMS_NORM = """class RmsNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        y = x.to(torch.float32)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)
"""
_MIXERS = {  # name -> what projects, what mixes the tokens of `v`
    "attention": ("q k v", "y = F.scaled_dot_product_attention(q, k, v)"),
    "spelt-out attention": ("q k v", "y = torch.softmax(q @ k.transpose(1, 2) / 2, dim=-1) @ v"),
    "mean": ("v", "y = v.mean(1, keepdim=True).expand_as(v)"),
    "cumulative mean": ("v", "y = v.cumsum(1) / torch.arange(1, v.shape[1] + 1, device=v.device)[:, None].to(v.dtype)"),
    "wide cumulative mean": (
        "v",
        "y = F.gelu(v).cumsum(1) / torch.arange(1, v.shape[1] + 1, device=v.device)[:, None].to(v.dtype)",
    ),
    "conv": ("v", "y = F.silu(self.conv(v.transpose(1, 2)).transpose(1, 2))"),
}
_CACHES = {
    "none": "",
    "plain object": """class Keep:
    table = None

    def __call__(self, x):
        self.table = table(x) if self.table is None else self.table
        return x + self.table


keep = Keep()""",
    "global": """KEPT = {}


def keep(x):
    if x.shape[1] not in KEPT:
        KEPT[x.shape[1]] = table(x)
    return x + KEPT[x.shape[1]]""",
    "lru_cache": """@functools.lru_cache
def cached(length, dtype):
    return torch.arange(length, dtype=dtype)[:, None] * 0.01


def keep(x):
    return x + cached(x.shape[1], x.dtype)""",
    "class": """class Keep:
    table = None


def keep(x):
    Keep.table = table(x) if Keep.table is None else Keep.table
    return x + Keep.table""",
    "closure": """def keeping():
    kept = None

    def keep(x):
        nonlocal kept
        kept = table(x) if kept is None else kept
        return x + kept

    return keep


keep = keeping()""",
    "default": """def keep(x, kept=[]):
    if not kept:
        kept.append(table(x))
    return x + kept[0]""",
    "thread-local": """LOCAL = threading.local()


def keep(x):
    if not hasattr(LOCAL, "table"):
        LOCAL.table = table(x)
    return x + LOCAL.table""",
    "real tensor": """COUNT = torch.zeros(())


def keep(x):
    COUNT.add_(1)
    return x * 1.0""",
}
_TABLE = """def table(x):
    return torch.arange(x.shape[1], dtype=x.dtype)[:, None] * 0.01
"""
_EXPERTS = ("two FFNs on one source", "experts by top-k", "experts by weight", "experts by index")  # and no FFN beside


@dataclasses.dataclass(frozen=True)
class Source:
    """A model's code, and what is true of it.

    Attributes:
        code: defines ``model``, ``example_inputs`` and ``expected``.
        expected: names of the down-projections that are FFNs.
        owner: the block of each down-projection, near-misses included.
        whole: down-projections of FFNs that are modules of their own -> the module's path.
    """

    code: str
    expected: frozenset[str]
    owner: dict[str, int]
    whole: dict[str, str]


def write(model: Model) -> Source:
    """The source of ``model``."""
    return _Writer(model).write()


class _Writer:
    def __init__(self, model: Model) -> None:
        self.model = model
        self.classes: list[str] = []
        self.written: list[Written] = []
        self.false: set[str] = set()
        self.owner: dict[str, int] = {}
        self.whole: dict[str, str] = {}
        self.scope = Scope("Model", "inputs")

    def write(self) -> Source:
        model, blocks, scope = self.model, self.model.blocks, self.scope
        for i, block in enumerate(blocks):
            self._write_block(i, block)
        self._write_stem()
        scope.make(f"self.blocks = nn.ModuleList([{', '.join(f'Block{i}()' for i in range(len(blocks)))}])")
        added, returned = [], []
        for i, block in enumerate(blocks):
            self._run_block(i, block, added, returned)
        self._write_head()
        scope.do(*(f"y = y + {penalty}" for penalty in added))
        results = ["y", *returned]
        result = {
            "tensor": results[0] if len(results) == 1 else ", ".join(results),
            "tuple": f"({', '.join(results)},)",
            "dict": "{" + ", ".join(f'"output{i}": {r}' for i, r in enumerate(results)) + "}",
        }[model.output]
        kept = [_TABLE, _CACHES[model.cache]] if model.cache != "none" else []
        parts = [_IMPORTS, *kept, *([_RMS_NORM] if any(b.norm == "RmsNorm" for b in blocks) else []), *self.classes]
        expected = frozenset(self.owner) - self.false
        return Source(
            "\n\n".join([*parts, scope.render(result), self._footer(expected)]), expected, self.owner, self.whole
        )

    def _footer(self, expected: frozenset[str]) -> str:
        model = self.model
        size = f"{model.batch}, {model.tokens}"
        inputs = f"torch.randn({size}, {model.width}, dtype={model.dtype})"
        if model.stem in ("embedding", "positions"):
            inputs = f"torch.randint({VOCABULARY}, ({size}))"
        cast = "" if model.dtype == "torch.float32" else f".to({model.dtype})"
        return (
            f"model = Model(){cast}.train({model.training})\n{self._float32()}example_inputs = ({inputs},)\n"
            f"expected = {sorted(expected)}\n"
        )

    def _float32(self) -> str:
        """Casts of down-projections that have a dtype of their own."""
        blocks = [b for i, b in enumerate(self.model.blocks) if b.ffn.cast == "down in float32" and not b.shared]
        paths = [down.removesuffix(".weight") for down, i in self.owner.items() if self.model.blocks[i] in blocks]
        return "".join(f"model.{_code(path)}.float()\n" for path in paths)

    def _write_stem(self) -> None:
        scope, width, stem = self.scope, self.model.width, self.model.stem
        vocabulary = next((b.ffn.hidden for b in self.model.blocks if b.miss == "up tied to the embedding"), VOCABULARY)
        if stem in ("embedding", "positions"):
            scope.make(f"self.embedding = nn.Embedding({vocabulary}, {width})")
            scope.do("x = self.embedding(inputs)")
        elif stem == "linear":
            scope.make(f"self.stem = nn.Linear({width}, {width})")
            scope.do("x = self.stem(inputs)")
        else:
            scope.do("x = inputs")
        if self.model.cache != "none":
            scope.do("x = keep(x)")
        if stem == "positions":
            scope.make(f"self.positions = nn.Embedding(64, {width})")
            scope.do("x = x + self.positions(torch.arange(inputs.shape[1], device=inputs.device))")

    def _write_head(self) -> None:
        scope, width, head = self.scope, self.model.width, self.model.head
        if head == "none":
            scope.do("y = x")
            return
        scope.make(f"self.norm = nn.LayerNorm({width})")
        scope.do("x = self.norm(x)")
        parts = {
            "linear": f"nn.Linear({width}, {VOCABULARY}, bias=False)",
            "pooler": f"nn.Sequential(nn.Linear({width}, {3 * width}), nn.Tanh(), nn.Linear({3 * width}, 3))",
            "projector": f"nn.Sequential(nn.Linear({width}, {3 * width}), nn.GELU(), nn.Linear({3 * width}, {width}))",
            "transform": f"nn.Sequential(nn.Linear({width}, {width}), nn.GELU(), nn.LayerNorm({width}), "
            f"nn.Linear({width}, {VOCABULARY}))",
        }
        if head == "tied":
            scope.do("y = F.linear(x, self.embedding.weight)")
        else:
            scope.make(f"self.head = {parts[head]}")
            scope.do("y = self.head(x.mean(1))" if head == "pooler" else "y = self.head(x)")

    def _run_block(self, i: int, block: Block, added: list[str], returned: list[str]) -> None:
        scope, written = self.scope, self.written[i]
        miss = MISSES[block.miss] if block.miss else Miss()
        path = f"self.blocks[{i}]."
        if block.shared:
            scope.make(f"self.blocks[{i}].ffn = self.blocks[0].ffn")
        if block.miss == "up tied to the embedding":
            scope.make(f"{path}{_code(written.up)}.weight = self.embedding.weight")
        if block.miss == "down tied to the next block":
            follower = self.written[i + 1]
            scope.make(f"self.blocks[{i + 1}].{_code(follower.down)}.weight = {path}{_code(written.down)}.weight")
        call = (
            f"self.blocks[{i}](x)" if not block.checkpoint else f"checkpoint(self.blocks[{i}], x, use_reentrant=False)"
        )
        scope.do(f"x, kept{i} = {call}" if miss.kept else f"x = {call}")
        use = miss.use.format(kept=f"kept{i}", i=i, weight=f"{path}{_code(written.weight)}")
        if "self.probe" in use:
            scope.make(f"self.probe{i} = nn.Linear({block.ffn.hidden}, {self.model.width})")
        if use.startswith("penalty: "):
            added.append(use.removeprefix("penalty: "))
        elif use.startswith("next: "):
            scope.do(f"x = x + {use.removeprefix('next: ')}")
        elif use:
            returned.append(use)

    def _write_block(self, i: int, block: Block) -> None:
        width, scope = self.model.width, Scope(f"Block{i}")
        miss = MISSES[block.miss] if block.miss else Miss()
        norms = (f"self.norm{k} = {block.norm}({width})" for k in range(1, 3 + (block.layout == "sandwich")))
        scope.make(*norms, f"self.mixer = Mixer{i}()")
        self._write_mixer(i, block)
        if block.layout == "macaron":
            ffn = dataclasses.replace(block.ffn, hidden=max(block.ffn.hidden, width + 4))
            plain = dataclasses.replace(block, ffn=ffn, miss=None, shared=False)
            scope.make(f"self.norm0 = {block.norm}({width})")
            scope.do("n = self.norm0(x)")
            self._add_ffn(scope, i, plain, "ffn_in", width)
            scope.do("x = x + 0.5 * y")
        scope.do(
            {
                "post": "x = self.norm1(x + self.mixer(x))\nn = x",
                "branch norm": "x = x + self.norm1(self.mixer(x))\nn = x",
                "parallel": "n = self.norm1(x)\na = self.mixer(n)",
            }.get(block.layout, "x = x + self.mixer(self.norm1(x))\nn = self.norm2(x)")
        )
        self._write_branch(scope, i, block, miss)
        if block.miss in ("no residual", "gate", "multiplied with the stream"):
            scope.do("x = y")
        else:
            scope.do("y = a + y" if block.layout == "parallel" else "", *block.residual.split("; "))
        if block.layout == "post":
            scope.do("x = self.norm2(x)")
        self.classes.append(scope.render("x, kept" if miss.kept else "x"))

    def _write_mixer(self, i: int, block: Block) -> None:
        width, scope = self.model.width, Scope(f"Mixer{i}", "n")
        inputs, mixing = _MIXERS[block.mixer]
        wide = 3 * width if block.mixer == "wide cumulative mean" else width
        for name in inputs.split():
            scope.make(f"self.{name} = nn.Linear({width}, {wide})")
            scope.do(f"{name} = self.{name}(n)")
        if block.mixer == "conv":
            scope.make(f"self.conv = nn.Conv1d({width}, {width}, 3, padding=1, groups={width})")
        scope.make(f"self.out = nn.Linear({wide}, {width})")
        scope.do(mixing)
        self.classes.append(scope.render("self.out(y)"))

    def _write_branch(self, scope: Scope, i: int, block: Block, miss: Miss) -> None:
        """Everything from the source to what is added to the stream."""
        width = self.model.width
        if not miss.around:
            written = self._add_ffn(scope, i, block, "ffn", width)
        else:
            written = self._add_around(scope, i, block, miss)
        self.written.append(written)
        if miss.kept == "y":
            scope.do("kept = y")
        if block.layout in ("branch norm", "sandwich"):
            scope.do(f"y = self.norm{3 if block.layout == 'sandwich' else 2}(y)")
        if block.scale == "layer scale":
            scope.make(f"self.scale = nn.Parameter(torch.full(({width},), 0.1))")
        scope.do({"none": "", "half": "y = 0.5 * y", "layer scale": "y = y * self.scale"}[block.scale])
        if block.drop_path:
            keep = "    keep = y.new_empty((y.shape[0],) + (1,) * (y.ndim - 1)).bernoulli_(0.9)"
            scope.do("if self.training:", keep, "    y = y * keep.div_(0.9)")

    def _add_around(self, scope: Scope, i: int, block: Block, miss: Miss) -> Written:
        width = self.model.tokens if block.miss == "token MLP" else self.model.width
        written = Written("", "", "")
        if "self.router" in miss.around:
            scope.make(f"self.router = nn.Linear({width}, 2)")
        if "{experts}" in miss.around:
            for k in range(2):
                written = self._add_ffn(Scope("Unused"), i, block, f"experts.{k}", width)
            scope.make(f"self.experts = nn.ModuleList([Ffn{i}_experts(), Ffn{i}_experts()])")
        before, ffn, after = miss.around.partition("y = {ffn}")
        scope.do(before.format(experts="self.experts"))
        if ffn:
            written = self._add_ffn(scope, i, block, "ffn", width)
        scope.do(after.format(experts="self.experts").removeprefix("\n"))
        return written

    def _add_ffn(self, scope: Scope, i: int, block: Block, name: str, width: int) -> Written:
        """Writes the FFN and its call, ``y = self.ffn(n)``, and notes its name and its truth."""
        miss, sizes = MISSES[block.miss] if block.miss else Miss(), Sizes(width, self.model.tokens)
        path = f"blocks.{i}."
        if block.shared:
            scope.do("y = self.ffn(n)")
            if block.miss:
                self.false.add(f"blocks.0.{self.written[0].weight}")
            return self.written[0]
        if block.ffn.home == "inline":
            scope.do("stream = x" if miss.stream else "")
            written = write_ffn(scope, block, sizes, f"{name}_", "n")
        elif block.ffn.home == "sequential":
            written = write_sequential(scope, block, width, name)
            scope.do(f"y = self.{name}(n)")
        else:
            owner = Scope(f"Ffn{i}_{name.partition('.')[0]}", "x, stream" if miss.stream else "x")
            inner = write_ffn(owner, block, sizes, "", "x")
            kept = miss.kept == "kept"
            code = owner.render("y, kept" if kept else "y")
            self.classes += [code] if code not in self.classes else []
            if "." not in name:  # experts are made and called by their router
                scope.make(f"self.{name} = {owner.name}()")
                arguments = "n, x" if miss.stream else "n"
                scope.do(f"y{', kept' if kept else ''} = self.{name}({arguments})")
            written = Written(*(f"{name}.{part}" for part in dataclasses.astuple(inner)))
        down = path + written.weight
        self.owner[down] = i
        if block.miss:
            self.false.add(down)
            if block.miss == "down tied to the next block":
                self.false.add(f"blocks.{i + 1}.{written.weight}")
        elif block.ffn.home != "inline":
            self.whole[down] = path + name
        return written


def _code(path: str) -> str:
    """``ffn.0.weight`` as code: ``ffn[0].weight``."""
    parts = [f"[{part}]" if part.isdigit() else f".{part}" for part in path.split(".")]
    return "".join(parts).removeprefix(".")
