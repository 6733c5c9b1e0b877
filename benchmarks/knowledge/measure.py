"""What a model knows: exact recall, bits of knowledge, and its loss on text that is no facts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.knowledge.data import NOTHING, Corpus, Questions
from benchmarks.knowledge.models.decoder import Decoder, evaluating

BATCH = 256


def answers(model: Decoder, questions: Questions) -> tuple[Tensor, Tensor]:
    """Of each question, whether greedy decoding writes the whole answer and END, bool [facts], and the bits of the
    answer under the model, -log2 of its probability, fp64 [facts].

    One teacher-forced forward is exact for the first: while all tokens so far are right, greedy decoding reads what
    teacher forcing reads, and the first wrong token fails the fact in both.
    """
    right, bits = [], []
    with evaluating(model):
        for tokens, targets in zip(questions.tokens.split(BATCH), questions.targets.split(BATCH), strict=True):
            longest = int((targets != NOTHING).any(0).nonzero().max()) + 1
            tokens, targets = tokens[:, :longest], targets[:, :longest]
            asked = targets != NOTHING  # [facts, longest]
            logits = model(tokens, asked.flatten().nonzero().flatten())  # [answers' tokens, vocabulary]
            wrong = torch.zeros_like(asked)
            wrong[asked] = logits.argmax(-1) != targets[asked]
            loss = torch.zeros(asked.shape, dtype=torch.float64)
            loss[asked] = F.cross_entropy(logits, targets[asked], reduction="none").double()
            right.append(~wrong.any(1))
            bits.append(loss.sum(1) / math.log(2))
    return torch.cat(right), torch.cat(bits)


def known_bits(relations: Sequence[str], code: Tensor, model: Tensor) -> float:
    """Bits of knowledge that a model has of facts, a lower bound in the sense of Allen-Zhu & Li 2024 (2404.05405).

    To tell somebody all answers takes sum_i code_i bits in a code that knows the list of answers of each relation and
    how often each occurs, but not whose they are (`facts.answer_bits`). Who has the model needs sum_i model_i bits
    (-log2 of the answers' probability, over their tokens and END). What the model saves is in its parameters:

        sum over relations of max(0, sum over the facts i of a relation of (code_i - model_i))

    The maximum stands where a model that knows nothing of a relation is left unused for it. Three differences from
    2404.05405, where answers are drawn from known distributions: the entropy is that of the answers' own frequencies;
    the spelling of the answers is not counted as knowledge, although the model has to store it; and answers that
    follow from another about the same subject count only what is left.

    Args:
        relations: of each fact.
        code, model: bits of each fact's answer, fp64 [facts].
    """
    saved: defaultdict[str, float] = defaultdict(float)
    for relation, difference in zip(relations, (code - model).tolist(), strict=True):
        saved[relation] += difference
    return sum(max(0.0, bits) for bits in saved.values())


def text_loss(model: Decoder, corpus: Corpus) -> float:
    """Bits a byte of the source code that is not trained, in rows of `context` tokens, each without what is before."""
    context, text = corpus.sizes.context, corpus.other_text
    starts = torch.arange(0, len(text) - context, context)
    windows = text[starts[:, None] + torch.arange(context + 1)]
    total = 0.0
    with evaluating(model):
        for rows in windows.split(BATCH // 4):
            logits = model(rows[:, :-1]).flatten(0, 1)
            total += F.cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum").item()
    bytes_per_token = corpus.other_text_bytes / len(text)
    return total / math.log(2) / (windows[:, 1:].numel() * bytes_per_token)


def recall(model: Decoder, questions: Questions) -> float:
    return answers(model, questions)[0].double().mean().item()


def measures(model: Decoder, corpus: Corpus) -> dict[str, Any]:
    """Every measure of a trained model.

    `recall` and `answer_bits` ask every fact once, in a template that it was trained in; `held_out` those about closed
    subjects in the template that they were not. `trained_closed` has the same facts as `held_out` in a trained one.
    """
    seen, held_out = corpus.seen(), corpus.held_out()
    right, bits = answers(model, seen)
    order = seen.facts.tolist()
    relations = [corpus.facts[i].relation for i in order]
    by_relation: defaultdict[str, list[float]] = defaultdict(list)
    for relation, is_right in zip(relations, right.tolist(), strict=True):
        by_relation[relation].append(is_right)
    closed = torch.tensor(corpus.closed)[seen.facts]
    return {
        "recall": right.double().mean().item(),
        "held_out": recall(model, held_out),
        "trained_closed": right[closed].double().mean().item(),
        "recall_by_relation": {name: sum(rights) / len(rights) for name, rights in sorted(by_relation.items())},
        "answer_bits": bits.mean().item(),
        "known_bits": known_bits(relations, corpus.bits[seen.facts], bits),
        "text_bits_per_byte": text_loss(model, corpus),
    }
