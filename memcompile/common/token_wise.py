"""Names of token-wise operators: what may stand between an FFN's projections.

The detector reads them in FX graphs, as names of ATen operators, and the stand-ins as a model runs, as names of torch
functions. Neither has overload suffixes or the trailing underscore of in-place forms.
"""

from __future__ import annotations

# Each element of the result depends on one element of each operand: what `torch.Tag.pointwise` marks, and the
# activations that are composed of such operators.
POINTWISE = frozenset(
    """abs acos acosh add addcdiv addcmul asin asinh atan atan2 atanh ceil celu clamp clamp_max clamp_min clip cos cosh
    div elu eq erf erfc erfinv exp exp2 expm1 float_power floor fmax fmin fmod frac ge gelu gt hardshrink hardsigmoid
    hardswish hardtanh heaviside isfinite isinf isnan le leaky_relu lerp lgamma log log10 log1p log2 log_sigmoid
    logaddexp logical_and logical_not logical_or logical_xor logit logsigmoid lt masked_fill maximum minimum mish mul
    nan_to_num ne neg positive pow prelu reciprocal relu relu6 remainder round rrelu rrelu_with_noise rsqrt rsub selu
    sgn sigmoid sign silu sin sinc sinh softplus softshrink softsign sqrt square sub tan tanh tanhshrink threshold
    true_divide trunc where xlogy""".split()
)

# Linear in the hidden activation as long as their other operands are not made of it.
LINEAR = frozenset(
    "add addcdiv addcmul div lerp masked_fill mul nan_to_num neg positive rsub sub true_divide where".split()
)

CASTS = frozenset(
    "to _to_copy float half bfloat16 double type type_as contiguous clone alias detach lift_fresh_copy".split()
)

DROPOUTS = frozenset("dropout native_dropout feature_dropout alpha_dropout feature_alpha_dropout dropout1d".split())

NORMS = frozenset("layer_norm rms_norm native_layer_norm _fused_rms_norm".split())

# Reductions are token-wise over feature dimensions alone: a norm that the model spells out.
FEATURE_REDUCTIONS = frozenset("mean var std sum amax amin norm linalg_vector_norm vector_norm".split())

# Views are token-wise as long as they keep tokens before features.
RESHAPES = frozenset(
    "view reshape flatten unflatten squeeze unsqueeze _unsafe_view view_as reshape_as expand expand_as".split()
)

FEATURE_SPLITS = frozenset("chunk split split_with_sizes tensor_split slice narrow unbind select".split())

FEATURE_JOINS = frozenset({"cat", "stack"})

TRANSPOSES = frozenset("t transpose permute movedim swapaxes numpy_T mT".split())

# Token-wise, if their dimensions are the right ones.
TOKEN_WISE = POINTWISE | CASTS | DROPOUTS | NORMS | FEATURE_REDUCTIONS | RESHAPES | FEATURE_SPLITS | FEATURE_JOINS
TOKEN_WISE |= TRANSPOSES

PROJECTIONS = frozenset("linear addmm matmul mm einsum tensordot".split())

# Which argument a projection projects, by position and by name; einsum has no fixed place.
PROJECTED = {"linear": (0, "input"), "addmm": (1, "mat1"), "matmul": (0, "input"), "mm": (0, "input")}
PROJECTED |= {"tensordot": (0, "a")}


def canonical(name: str) -> str:
    """The operator of a spelling: ``__rmul__``, ``mul_``, ``multiply`` -> ``mul``. A table and no string
    handling, because Dynamo traces this call and folds look-ups of a function's name, but not its methods.
    """
    return _SPELLINGS.get(name, name)


_KNOWN = TOKEN_WISE | {"glu"}
_SPELLINGS = {name: name for name in _KNOWN | PROJECTIONS} | {f"{name}_": name for name in _KNOWN}
for _operator, _name in {"add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "pow": "pow"}.items():
    _SPELLINGS |= {f"__{prefix}{_operator}__": _name for prefix in ("", "r", "i")}
_SPELLINGS |= {f"__{name}__": name for name in ("eq", "ne", "lt", "le", "gt", "ge")}
_SPELLINGS |= {"__neg__": "neg", "__pos__": "positive", "__abs__": "abs", "__invert__": "logical_not"}
_SPELLINGS |= {"__and__": "logical_and", "__or__": "logical_or", "__matmul__": "matmul", "__rmatmul__": "matmul"}
_SPELLINGS |= {"swish": "silu", "multiply": "mul", "divide": "div", "subtract": "sub", "absolute": "abs"}
_SPELLINGS |= {"greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le", "not_equal": "ne"}
_SPELLINGS |= {"concat": "cat", "concatenate": "cat", "swapdims": "swapaxes", "moveaxis": "movedim"}
_SPELLINGS |= {"special_expit": "sigmoid", "special_erf": "erf", "special_expm1": "expm1", "negative": "neg"}
_SPELLINGS |= {"arctan": "atan", "arcsinh": "asinh", "bitwise_and": "logical_and", "bitwise_or": "logical_or"}
_SPELLINGS |= {"bitwise_not": "logical_not"}
