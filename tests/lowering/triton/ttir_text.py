"""Names of results and types of elements, in the text of Triton's TTIR: what `addresses.py` reads it by."""

import re


def results(left: str) -> list[str]:
    """``%a:2`` is ``%a#0`` and ``%a#1``; ``%a, %b`` is both."""
    names = []
    for part in left.split(", "):
        name, _, count = part.partition(":")
        names += [f"{name}#{index}" for index in range(int(count))] if count else [name]
    return names


def result_type(operation: str, types: str) -> str:
    """Of an element of the result, from what an operation says of types: ``a -> b``, ``a to b``, ``a, b`` or ``a``."""
    if operation in ("arith.cmpi", "arith.cmpf") or types in ("arith.constant true", "arith.constant false"):
        return "i1"
    made = re.split(r" -> | to ", types)[-1]
    parts = [element(part) for part in split_types(made)] or [""]
    if operation == "tt.load":
        pointee = re.match(r"!tt\.ptr<([^,>]*)", parts[0])
        return pointee.group(1) if pointee else parts[0]
    return parts[0] if operation == "tt.addptr" else parts[-1]


def split_types(text: str) -> list[str]:
    """At the commas that are not inside angle brackets."""
    parts, depth = [""], 0
    for character in text.replace("->", ""):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def element(dtype: str) -> str:
    """``tensor<4x8xi32>`` is i32, a tensor of pointers their pointer."""
    match = re.fullmatch(r"tensor<(?:\d+x)*(.*)>", dtype.strip())
    return match.group(1) if match else dtype.strip()
