"""Writes an FFN as Python source, in one of its many spellings."""

from __future__ import annotations

import dataclasses
import textwrap

from tests.fuzz.misses import FUSED, MISSES, Miss
from tests.fuzz.spec import MODULES, Block


@dataclasses.dataclass
class Scope:
    """A class that is being written: what its ``__init__`` makes and what its ``forward`` does."""

    name: str
    arguments: str = "x"
    init: list[str] = dataclasses.field(default_factory=list)
    body: list[str] = dataclasses.field(default_factory=list)

    def make(self, *code: str) -> None:
        self.init += [line for part in code for line in part.splitlines()]

    def do(self, *code: str) -> None:
        self.body += [line for part in code for line in part.splitlines()]

    def render(self, result: str) -> str:
        init = textwrap.indent("\n".join(["super().__init__()", *self.init]), " " * 8)
        body = textwrap.indent("\n".join([*self.body, f"return {result}"]), " " * 8)
        return (
            f"class {self.name}(nn.Module):\n    def __init__(self):\n{init}\n\n"
            f"    def forward(self, {self.arguments}):\n{body}\n"
        )


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What an FFN reads: features, and how many tokens a sequence has."""

    width: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class Written:
    """How the code around an FFN speaks of it: paths of its projections, relative to the module that it is part of."""

    up: str
    down: str
    weight: str  # of the down-projection


def write_ffn(scope: Scope, block: Block, sizes: Sizes, prefix: str, x: str) -> Written:
    """Adds the FFN of ``block``, its miss included, to ``scope``: it reads ``x`` and writes ``y``."""
    return _Writer(scope, block, sizes, prefix, x).write()


class _Writer:
    def __init__(self, scope: Scope, block: Block, sizes: Sizes, prefix: str, x: str) -> None:
        self.scope, self.block, self.ffn, self.prefix, self.x = scope, block, block.ffn, prefix, x
        self.own, self.width, self.tokens = f"self.{prefix}", sizes.width, sizes.tokens
        self.miss = MISSES[block.miss] if block.miss else Miss()

    def write(self) -> Written:
        ffn, scope, late = self.ffn, self.scope, self.block.late
        if ffn.flat:
            scope.do(f"flat = {self.x}.reshape(-1, {self.width})")
            original, self.x = self.x, "flat"
        gate = self._write_up()
        if not late:
            self._write_miss()
        if self.block.miss != "no nonlinearity" and ffn.gating != "F.glu":
            self._write_activation(gate or "h")
        if gate is not None:
            scope.do("h = h * g" if ffn.gate_last else "h = g * h")
        self._write_inner_norm()
        if late:
            self._write_miss()
        if ffn.dropout in ("between", "both"):
            scope.do("h = F.dropout(h, 0.1, self.training)")
        if ffn.cast == "down in float32":
            scope.do(f"h = h.to({self.own}down.weight.dtype)")
        if self.block.miss == "up tied to down":
            scope.do(f"y = F.linear(h, {self.own}up.weight.t())")
        else:
            self._project("y", "h", "down", ffn.hidden, self.width)
        scope.do(self._fill(self.miss.after))
        if ffn.cast == "down in float32":
            scope.do(f"y = y.to({self.x}.dtype)")
        if ffn.flat:
            scope.do(f"y = y.view({original}.shape)")
        if ffn.dropout in ("after", "both"):
            scope.make(f"{self.own}dropout = nn.Dropout(0.1)")
            scope.do(f"y = {self.own}dropout(y)")
        up = "gate_up" if ffn.gating in FUSED else "up"
        scope.make(self._fill(self.miss.init, up=f"{self.own}{up}", down=f"{self.own}down"))
        return Written(f"{self.prefix}{up}", f"{self.prefix}down", f"{self.prefix}{self._down()}")

    def _write_up(self) -> str | None:
        """Writes ``h``, and the gate if there is one; returns its name."""
        hidden, gating, scope = self.ffn.hidden, self.ffn.gating, self.scope
        if gating not in FUSED:
            if gating == "gated":
                self._project("g", self.x, "gate", self.width, hidden)
            self._project("h", self.x, "up", self.width, hidden)
            return "g" if gating == "gated" else None
        self._project("f", self.x, "gate_up", self.width, 2 * hidden)
        scope.do(
            {
                "chunk": "g, h = f.chunk(2, dim=-1)",
                "torch.chunk": "g, h = torch.chunk(f, 2, -1)",
                "split": f"g, h = f.split({hidden}, dim=-1)",
                "slices": f"g, h = f[..., :{hidden}], f[..., {hidden}:]",
                "every other": "g, h = f[..., ::2], f[..., 1::2]",
                "unflatten and unbind": f"g, h = f.unflatten(-1, (2, {hidden})).unbind(-2)",
                "view and select": f"f = f.view(*f.shape[:-1], {hidden}, 2)\ng, h = f.select(-1, 0), f.select(-1, 1)",
                "F.glu": "h = F.glu(f, dim=-1)",
            }[gating]
        )
        return None if gating == "F.glu" else "g"

    def _project(self, result: str, x: str, name: str, width_in: int, width_out: int) -> None:
        scope, kind, bias = self.scope, self.ffn.projection, self.ffn.bias
        own = f"{self.own}{name}"
        if kind == "linear":
            scope.make(f"{own} = nn.Linear({width_in}, {width_out}{'' if bias else ', bias=False'})")
            scope.do(f"{result} = {own}({x})")
            return
        size = (width_out, width_in) if kind in ("F.linear", "x @ w.T") else (width_in, width_out)
        scope.make(f"{own}_weight = nn.Parameter(torch.randn{size} * 0.2)")
        if bias:
            scope.make(f"{own}_bias = nn.Parameter(torch.zeros({width_out}))")
        added, given = (f" + {own}_bias", f", {own}_bias") if bias else ("", "")
        letters = "n" if self.ffn.flat else "bt"
        rows = x if self.ffn.flat else f"{x}.reshape(-1, {width_in})"
        back = "" if self.ffn.flat else f".view(*{x}.shape[:-1], {width_out})"
        addmm = f"torch.addmm({own}_bias, {rows}, {own}_weight)" if bias else f"torch.mm({rows}, {own}_weight)"
        code = {
            "x @ w": f"{x} @ {own}_weight{added}",
            "x @ w.T": f"torch.matmul({x}, {own}_weight.T){added}",
            "F.linear": f"F.linear({x}, {own}_weight{given})",
            "addmm": f"{addmm}{back}",
            "einsum": f'torch.einsum("{letters}i,io->{letters}o", {x}, {own}_weight){added}',
        }[kind]
        scope.do(f"{result} = {code}")

    def _write_activation(self, h: str) -> None:
        activation, scope = self.ffn.activation, self.scope
        cast, back = {
            "none": (None, None),
            "down in float32": (None, None),
            "to(float32), to(dtype)": (f"{h} = {h}.to(torch.float32)", f"{h} = {h}.to({self.x}.dtype)"),
            "float(), type_as": (f"{h} = {h}.float()", f"{h} = {h}.type_as({self.x})"),
            "float(), to(weight.dtype)": (f"{h} = {h}.float()", f"{h} = {h}.to({self.own}{self._down()}.dtype)"),
        }[self.ffn.cast]
        if cast:
            scope.do(cast)
        if activation in MODULES:
            scope.make(f"{self.own}act = {activation}")
            scope.do(f"{h} = {self.own}act({h})")
        else:
            if "beta" in activation:
                scope.make(f"{self.own}beta = nn.Parameter(torch.ones(1))")
            scope.do(f"{h} = {activation.format(h=h, own=self.own)}")
        if back:
            scope.do(back)

    def _down(self) -> str:
        return "down.weight" if self.ffn.projection == "linear" else "down_weight"

    def _write_inner_norm(self) -> None:
        kind, own, hidden = self.ffn.inner_norm, self.own, self.ffn.hidden
        if kind == "rms spelt out":
            self.scope.make(f"{own}inner = nn.Parameter(torch.ones({hidden}))")
            self.scope.do(f"h = {own}inner * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))")
        elif kind != "none":
            self.scope.make(f"{own}inner = {kind}({hidden})")
            self.scope.do(f"h = {own}inner(h)")

    def _write_miss(self) -> None:
        self.scope.do(self._fill(self.miss.between))

    def _fill(self, code: str, **names: str) -> str:
        names |= {"h": "h", "x": self.x, "own": self.own, "prefix": self.prefix, "buffer": "self.register_buffer"}
        return code.format(**names, hidden=self.ffn.hidden, width=self.width, tokens=self.tokens)


def write_sequential(scope: Scope, block: Block, width: int, prefix: str) -> Written:
    """Adds the FFN of ``block`` to ``scope`` as an ``nn.Sequential`` named ``prefix``."""
    ffn, own = block.ffn, f"self.{prefix}"
    bias = "" if ffn.bias else ", bias=False"
    parts = [f"nn.Linear({width}, {ffn.hidden}{bias})"]
    parts += [ffn.activation] if block.miss != "no nonlinearity" else []
    parts += [f"{ffn.inner_norm}({ffn.hidden})"] if ffn.inner_norm != "none" else []
    parts += ["nn.Dropout(0.1)"] if ffn.dropout in ("between", "both") else []
    down = len(parts)
    parts += [f"nn.Linear({ffn.hidden}, {width}{bias})"]
    parts += ["nn.Dropout(0.1)"] if ffn.dropout in ("after", "both") else []
    scope.make(f"{own} = nn.Sequential({', '.join(parts)})")
    if block.miss:
        scope.make(MISSES[block.miss].init.format(up=f"{own}[0]", down=f"{own}[{down}]"))
    return Written(f"{prefix}.0", f"{prefix}.{down}", f"{prefix}.{down}.weight")
