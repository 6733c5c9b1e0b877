"""The order of scores as integers, for kernels: one int64 holds a score and its index, and sorts by the rule of
`product_key_topk`: the larger score first, NaN above all, -0.0 as 0.0, and of equals the lower index.
"""

import triton
import triton.language as tl


@triton.jit
def ascending(score):
    """fp32 to an int32 that sorts as the score does. No score becomes -2**31: that is what absent keys are."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(score == score, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def pack(ascending_score, index):
    """(int32 of `ascending`, int32 index >= 0) to int64, larger for the better of two."""
    return (ascending_score.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def packed_score(packed):
    """The score of a packed pair, fp32."""
    high = (packed >> 32).to(tl.int32)
    return (high ^ ((high >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def packed_index(packed):
    """The index of a packed pair, int32."""
    return 0x7FFFFFFF - (packed & 0x7FFFFFFF).to(tl.int32)
