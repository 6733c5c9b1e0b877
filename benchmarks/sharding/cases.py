"""What is measured: a layer whose table so many processes share, and how many tokens each of them has."""

from dataclasses import dataclass

WEAK, STRONG = "weak", "strong"  # tokens of a rank are fixed, or those of all ranks together


@dataclass(frozen=True)
class Sizes:
    """Of one layer, fp32, whose rows are as wide as it is."""

    width: int = 256
    n_keys: int = 512
    heads: int = 4
    top_k: int = 32
    tokens: int = 256  # of a rank where they are fixed
    ranks: tuple[int, ...] = (1, 2, 4)  # ascending, each divides the last

    @property
    def hits(self) -> int:
        return self.heads * self.top_k

    @property
    def slots(self) -> int:
        return self.n_keys**2

    @property
    def all_tokens(self) -> int:
        """Of all ranks where that is fixed: with two ranks, each then has `tokens`."""
        return 2 * self.tokens


@dataclass(frozen=True)
class Case:
    ranks: int
    by: str  # "columns" or "rows"
    tokens: int  # of each rank


def scaling(sizes: Sizes) -> dict[str, list[Case]]:
    """The cases of each curve, ascending; a case may be on both."""
    return {
        WEAK: [Case(ranks, "columns", sizes.tokens) for ranks in sizes.ranks],
        STRONG: [Case(ranks, "columns", sizes.all_tokens // ranks) for ranks in sizes.ranks],
    }


def rows_case(sizes: Sizes) -> Case:
    """By rows, to compare with two ranks by columns."""
    return Case(2, "rows", sizes.tokens)


def all_cases(sizes: Sizes) -> list[Case]:
    curves = scaling(sizes)
    return list(dict.fromkeys([*curves[WEAK], *curves[STRONG], rows_case(sizes)]))
