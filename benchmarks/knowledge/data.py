"""What is trained and asked: facts as tokens, text that is no facts, and batches that mix both."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.knowledge.facts import HELD_OUT, TEMPLATES, Fact, Subject, answer_bits, closed_subjects
from benchmarks.knowledge.words import END, Vocabulary

NOTHING = -100  # a target that is not learned
HELD_OUT_FILES = 10  # one file of so many is for the loss alone


@dataclass(frozen=True)
class Sizes:
    """Of the data.

    Attributes:
        facts: how many, drawn at random; 0 for all.
        text_bytes: of source code to train on, and a tenth of that for its loss.
        rows, text_rows: of a batch: so many of facts, and of source code.
        context: tokens in a row.
    """

    facts: int
    text_bytes: int = 1_000_000
    vocabulary: int = 1024
    context: int = 64
    rows: int = 64
    text_rows: int = 16

    @property
    def tokens_per_step(self) -> int:
        return (self.rows + self.text_rows) * self.context


def source_code(sizes: Sizes, folder: Path | None = None) -> tuple[str, str]:
    """Python's standard library: text to train on, and text of other files for its loss."""
    files = sorted((folder or Path(sysconfig.get_path("stdlib"))).glob("*.py"))
    parts: tuple[list[str], list[str]] = ([], [])
    limits = sizes.text_bytes, sizes.text_bytes // HELD_OUT_FILES
    for i, file in enumerate(files):
        part = i % HELD_OUT_FILES == 0
        if sum(map(len, parts[part])) < limits[part]:
            parts[part].append(file.read_text(errors="replace"))
    train, held_out = ("".join(part)[:limit] for part, limit in zip(parts, limits, strict=True))
    return train, held_out


@dataclass(frozen=True)
class Questions:
    """Facts, each in one template.

    Attributes:
        tokens: [facts, longest], the answer and END included, filled up with END.
        targets: the same shape: at each position the next token where that is the answer's, else NOTHING.
        facts: their indices, [facts].
    """

    tokens: Tensor
    targets: Tensor
    facts: Tensor


class Corpus:
    """The data of a run: the same for the same sizes, subjects and text.

    Attributes:
        facts: that fit into half a row in every template.
        closed: of each fact, whether its subject is closed: see `closed_subjects`.
        bits: of each fact: see `answer_bits`.
        left_out: facts that did not fit.
    """

    def __init__(self, sizes: Sizes, subjects: Sequence[Subject], text: str, other_text: str) -> None:
        self.sizes = sizes
        facts = [fact for subject in subjects for fact in subject]
        sentences = [f"{fact.question(i)} {fact.answer}" for fact in facts for i in range(HELD_OUT + 1)]
        self.vocabulary = Vocabulary([*sentences, text[: sum(map(len, sentences)) // 4]], sizes.vocabulary)
        encoded = [self._encode(fact) for fact in facts]
        fits = [max(len(q) + len(a) for q, a in forms) <= sizes.context // 2 for forms in encoded]
        closed = [
            is_closed for subject, is_closed in zip(subjects, closed_subjects(subjects), strict=True) for _ in subject
        ]
        self.facts = [fact for fact, fit in zip(facts, fits, strict=True) if fit]
        self.closed = [is_closed for is_closed, fit in zip(closed, fits, strict=True) if fit]
        self._encoded = [forms for forms, fit in zip(encoded, fits, strict=True) if fit]
        self.left_out = len(facts) - len(self.facts)
        self.bits = torch.tensor(answer_bits(self.facts), dtype=torch.float64)
        self.text, self.other_text = (torch.tensor(self.vocabulary.encode(t)) for t in (text, other_text))
        self.other_text_bytes = len(other_text.encode())
        if min(len(self.text), len(self.other_text)) <= sizes.context:
            raise ValueError(f"text_bytes={sizes.text_bytes} gives less than a row of {sizes.context} tokens: raise it")

    def _encode(self, fact: Fact) -> list[tuple[list[int], list[int]]]:
        answer = [*self.vocabulary.encode(f" {fact.answer}"), END]
        return [(self.vocabulary.encode(fact.question(i)), answer) for i in range(len(TEMPLATES[fact.relation]))]

    def trained_templates(self, fact: int) -> tuple[int, ...]:
        return tuple(i for i in range(HELD_OUT + 1) if i != HELD_OUT or not self.closed[fact])

    def seen_template(self, fact: int, epoch: int) -> int:
        """Each fact takes its trained templates in turns."""
        templates = self.trained_templates(fact)
        return templates[(fact + epoch) % len(templates)]

    def sentence(self, fact: int, template: int) -> tuple[list[int], list[int]]:
        """The tokens of question, answer and END, and at each position what is to be learned there."""
        question, answer = self._encoded[fact][template]
        return question + answer, [NOTHING] * (len(question) - 1) + answer + [NOTHING]

    def seen(self, at_most: int | None = None) -> Questions:
        """All facts in one of the templates that every fact is trained in, or the first `at_most` of them."""
        return self._ask([(fact, fact % HELD_OUT) for fact in range(len(self.facts))][:at_most])

    def held_out(self) -> Questions:
        """Facts about closed subjects, in the template that they were never trained in."""
        return self._ask([(fact, HELD_OUT) for fact in range(len(self.facts)) if self.closed[fact]])

    def _ask(self, asked: list[tuple[int, int]]) -> Questions:
        sentences = sorted((self.sentence(fact, template), fact) for fact, template in asked)
        sentences.sort(key=lambda item: len(item[0][0]))  # so that a batch has few positions that are filled up
        tokens = torch.full((len(asked), self.sizes.context // 2), END)
        targets = torch.full_like(tokens, NOTHING)
        for row, ((sentence, targets_of), _) in enumerate(sentences):
            tokens[row, : len(sentence)] = torch.tensor(sentence)
            targets[row, : len(sentence)] = torch.tensor(targets_of)
        return Questions(tokens, targets, torch.tensor([fact for _, fact in sentences]))

    def digest(self) -> str:
        """Of all that is trained or asked: the packages' and Python's versions change it."""
        content = repr((self.sizes, self.facts, self.closed, self.text.tolist(), self.other_text.tolist()))
        return hashlib.sha256(content.encode()).hexdigest()[:16]


class Batches:
    """The batches of a training in their order. Every fact comes once an epoch; epochs join without a break.

    Attributes:
        step, shown: how many batches and facts have been taken: all that the next batch depends on, beside the seed.
    """

    def __init__(self, corpus: Corpus, seed: int) -> None:
        self._corpus, self._seed = corpus, seed
        self.step = self.shown = 0
        self._epoch = -1
        self._order: list[int] = []

    def _next_sentence(self) -> tuple[list[int], list[int]]:
        epoch, place = divmod(self.shown, len(self._corpus.facts))
        if epoch != self._epoch:
            self._epoch, self._order = (
                epoch,
                torch.randperm(len(self._corpus.facts), generator=self._random(0, epoch)).tolist(),
            )
        fact = self._order[place]
        return self._corpus.sentence(fact, self._corpus.seen_template(fact, epoch))

    def _random(self, kind: int, number: int) -> torch.Generator:
        # hashed: of a seed, the CPU's generator takes the lower 32 bits alone
        digest = hashlib.sha256(f"{self._seed} {kind} {number}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))

    def take(self) -> tuple[Tensor, Tensor]:
        """Tokens and targets int64 [rows + text_rows, context].

        A row of facts has as many whole sentences as fit. The next sentence's beginning fills it up, without targets.
        """
        sizes = self._corpus.sizes
        rows, goals = [], []
        for _ in range(sizes.rows):
            row: list[int] = []
            goal: list[int] = []
            while True:
                sentence, targets = self._next_sentence()
                if len(row) + len(sentence) > sizes.context:
                    break
                row += sentence
                goal += targets
                self.shown += 1
            rest = sizes.context - len(row)
            rows.append(row + sentence[:rest])
            goals.append(goal + [NOTHING] * rest)
        text = self._corpus.text
        starts = torch.randint(len(text) - sizes.context, (sizes.text_rows, 1), generator=self._random(1, self.step))
        windows = text[starts + torch.arange(sizes.context + 1)]
        self.step += 1
        tokens = torch.cat([torch.tensor(rows), windows[:, :-1]])
        return tokens, torch.cat([torch.tensor(goals), windows[:, 1:]])
