"""A small vocabulary of word pieces, made from the texts at the start: byte-pair encoding (Sennrich et al. 2016)."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable

END = 256  # the token after each answer; 0 to 255 are bytes, and pieces follow
_WORDS = re.compile(rb" ?[A-Za-z\x80-\xff]+| ?[0-9]+| +(?= )|\s|[^\sA-Za-z0-9\x80-\xff]")


class Vocabulary:
    """Of `size` tokens: bytes, END, and the pieces that pair up most often in `texts`. Ties go to the smaller pair."""

    def __init__(self, texts: Iterable[str], size: int) -> None:
        if size <= END + 1:
            raise ValueError(f"a vocabulary needs more than {END + 1} tokens (the bytes and the end), got {size}")
        counts = Counter(word for text in texts for word in _WORDS.findall(text.encode()))
        words = [[*word] for word in counts]
        weights = [*counts.values()]
        pairs: Counter[tuple[int, int]] = Counter()
        where: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
        for i, word in enumerate(words):
            for pair in itertools.pairwise(word):
                pairs[pair] += weights[i]
                where[pair].add(i)
        self._pieces: dict[tuple[int, int], int] = {}
        self.size = size
        for token in range(END + 1, size):
            pair, count = min(pairs.items(), key=lambda item: (-item[1], item[0]), default=((0, 0), 0))
            if count < 2:
                self.size = token
                break
            self._pieces[pair] = token
            for i in where.pop(pair):
                for old in itertools.pairwise(words[i]):
                    pairs[old] -= weights[i]
                words[i] = _joined(words[i], pair, token)
                for new in itertools.pairwise(words[i]):
                    pairs[new] += weights[i]
                    where[new].add(i)
            del pairs[pair]
        self._known: dict[bytes, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        return [token for word in _WORDS.findall(text.encode()) for token in self._encode_word(word)]

    def _encode_word(self, word: bytes) -> list[int]:
        if word not in self._known:
            tokens = [*word]
            while True:
                found = [self._pieces[p] for p in itertools.pairwise(tokens) if p in self._pieces]
                if not found:
                    break
                first = min(found)  # pieces are joined in the order in which they were made
                tokens = _joined(tokens, next(p for p, t in self._pieces.items() if t == first), first)
            self._known[word] = tokens
        return self._known[word]

    def decode(self, tokens: Iterable[int]) -> str:
        parts = {token: pair for pair, token in self._pieces.items()}

        def as_bytes(token: int) -> bytes:
            if token == END:
                return b"\n"
            return bytes([token]) if token < END else b"".join(map(as_bytes, parts[token]))

        return b"".join(map(as_bytes, tokens)).decode(errors="replace")


def _joined(tokens: list[int], pair: tuple[int, int], token: int) -> list[int]:
    out, i = [], 0
    while i < len(tokens):
        if (tokens[i], tokens[i + 1] if i + 1 < len(tokens) else -1) == pair:
            out.append(token)
            i += 2
        else:
            out.append(tokens[i])
            i += 1
    return out
