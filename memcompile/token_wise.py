"""The vocabulary of token-wise operators: what may stand between an FFN's projections.

Both readers of it speak of the same programs, one ahead of time and one as it runs: the detector reads aten
names in FX graphs, the hidden stand-in reads the names of torch functions. Overload suffixes and the trailing
underscore of in-place forms are stripped before either looks here.
"""

from __future__ import annotations

ACTIVATIONS = frozenset(
    """relu relu6 gelu silu mish elu selu celu leaky_relu prelu rrelu rrelu_with_noise sigmoid tanh hardswish
    hardtanh hardsigmoid softplus softsign logsigmoid log_sigmoid hardshrink softshrink tanhshrink threshold
    erf exp expm1 log1p square abs sin cos clamp clip clamp_min clamp_max sinh cosh atan asinh glu pow
    maximum minimum where""".split()
)

ARITHMETIC = frozenset("add sub mul div true_divide neg rsub addcmul lerp sqrt rsqrt reciprocal".split())

CASTS = frozenset(
    "to _to_copy float half bfloat16 double type type_as contiguous clone alias detach lift_fresh_copy".split()
)

DROPOUTS = frozenset("dropout native_dropout feature_dropout alpha_dropout dropout1d".split())

NORMS = frozenset("layer_norm rms_norm native_layer_norm _fused_rms_norm".split())

# Reductions are token-wise over the feature dimension alone: a norm that the model spells out.
FEATURE_REDUCTIONS = frozenset("mean var std sum amax norm linalg_vector_norm vector_norm".split())

# Views are token-wise as long as features stay last.
RESHAPES = frozenset("view reshape flatten unflatten squeeze unsqueeze _unsafe_view view_as reshape_as".split())

FEATURE_SPLITS = frozenset("chunk split split_with_sizes tensor_split slice narrow".split())

PROJECTIONS = frozenset("linear addmm matmul mm".split())


def canonical(name: str) -> str:
    """The operator behind a spelling: ``__rmul__``, ``mul_``, ``multiply`` -> ``mul``. A table and no string
    handling, because Dynamo traces this call and folds look-ups of a function's name, but not its methods.
    """
    return _SPELLINGS.get(name, name)


def _spellings() -> dict[str, str]:
    known = ACTIVATIONS | ARITHMETIC | CASTS | DROPOUTS | NORMS | FEATURE_REDUCTIONS | RESHAPES | FEATURE_SPLITS
    spellings = {name: name for name in known | PROJECTIONS}
    spellings |= {f"{name}_": name for name in known}
    for operator, name in {"add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "pow": "pow"}.items():
        spellings |= {f"__{prefix}{operator}__": name for prefix in ("", "r", "i")}
    spellings |= {"__neg__": "neg", "__abs__": "abs", "__matmul__": "matmul", "__rmatmul__": "matmul"}
    spellings |= {"swish": "silu", "multiply": "mul", "divide": "div", "subtract": "sub", "absolute": "abs"}
    return spellings


_SPELLINGS = _spellings()
