"""The facts of the benchmark of knowledge: where they come from, what is trained and what is held out."""

import pytest
import torch

from benchmarks.knowledge.data import NOTHING, Batches, Corpus, source_code
from benchmarks.knowledge.facts import (
    HELD_OUT,
    TEMPLATES,
    Fact,
    airport_facts,
    answer_bits,
    city_facts,
    closed_subjects,
    country_facts,
    most_frequent_share,
    sample,
)
from benchmarks.knowledge.words import END, Vocabulary
from tests.benchmarks.knowledge_data import DATA, corpus, subjects

COUNTRIES = {"PE": "Peru", "TD": "Chad"}


def test_facts_of_the_packages_records():
    airports = {
        "SPJC": {"country": "PE", "city": "Lima", "elevation": 112.6},
        "SPZZ": {"country": "??", "city": "", "elevation": -3.0},
    }
    known, unknown = airport_facts(airports, COUNTRIES)
    assert [(f.relation, f.subject, f.answer, f.given) for f in known] == [
        ("airport country", "SPJC", "Peru", ""),
        ("airport city", "SPJC", "Lima", "Peru"),
        ("airport elevation", "SPJC", "113", ""),
    ]
    assert [f.answer for f in unknown] == ["-3"]
    country = {"name": "Chad", "capital": "N'Djamena", "currencyname": "Franc", "neighbours": "NE,LY,CF"}
    island = {"name": "Nowhere", "capital": "", "currencyname": "", "neighbours": ""}
    assert [[f.answer for f in facts] for facts in country_facts([country, island])] == [
        ["N'Djamena", "Franc", "CF LY NE"]
    ]


def test_cities_of_the_same_name_are_left_out():
    cities = [
        {"name": name, "countrycode": code, "timezone": zone}
        for name, code, zone in (
            ("Lima", "PE", "America/Lima"),
            ("San", "PE", "a"),
            ("San", "TD", "b"),
            ("Far", "??", "c"),
        )
    ]
    assert [(f.subject, f.answer, f.given) for facts in city_facts(cities, COUNTRIES) for f in facts] == [
        ("Lima", "Peru", ""),
        ("Lima", "America/Lima", "Peru"),
    ]


def test_templates():
    for forms in TEMPLATES.values():
        assert len(set(forms)) == HELD_OUT + 1
        assert all(form.count(" {}") == 1 for form in forms)  # after a space: the same tokens in each


def test_a_sample_is_the_same_at_each_call_and_keeps_subjects_whole():
    chosen = sample(subjects(50), 30)
    assert chosen == sample(subjects(50), 30) and chosen != subjects(50)[:15]
    assert len(chosen) == 15 and all(len(facts) == 2 for facts in chosen)
    assert len(sample(subjects(50), 0)) == 50


def test_answer_bits_by_hand():
    facts = [Fact("airport country", str(i), answer) for i, answer in enumerate(("Peru", "Peru", "Peru", "Chad"))]
    # Among two airports of Peru each city is one of two; Chad's only one is known.
    facts += [
        Fact("airport city", str(i), city, given)
        for i, (city, given) in enumerate((("a", "P"), ("b", "P"), ("a", "C")))
    ]
    third = 0.41503749927884376  # log2(4 / 3)
    assert answer_bits(facts) == pytest.approx([third, third, third, 2, 1, 1, 0], abs=1e-12)
    assert most_frequent_share(facts) == (3 + 2) / 7


def test_closed_subjects_are_half_and_never_trained_in_the_held_out_template():
    data = corpus()
    assert sum(closed_subjects(subjects())) == 6 and sum(data.closed) == 12
    batches = Batches(data, seed=0)
    trained = set()
    while batches.shown < 4 * (HELD_OUT + 1) * len(data.facts):
        for row in batches.take()[0][: DATA.rows]:
            trained.update(data.vocabulary.decode(row.tolist()).split("\n")[:-1])  # the last one is a beginning
    for i, fact in enumerate(data.facts):
        sentences = [f"{fact.question(template)} {fact.answer}" in trained for template in range(HELD_OUT + 1)]
        assert sentences == [True] * HELD_OUT + [not data.closed[i]]
    asked = data.held_out()
    assert sorted(asked.facts.tolist()) == [i for i, closed in enumerate(data.closed) if closed]
    for row, i in zip(asked.tokens.tolist(), asked.facts.tolist(), strict=True):
        assert data.vocabulary.decode(row).startswith(data.facts[i].question(HELD_OUT))


def test_each_fact_comes_once_an_epoch_and_both_parts_of_a_fact_are_of_one_kind():
    data = corpus()
    assert data.closed[::2] == data.closed[1::2]  # each subject has two facts
    batches, seen = Batches(data, seed=3), []
    take = batches._next_sentence

    def spied():
        sentence = take()
        seen.append((batches.shown, batches._order[batches.shown % len(data.facts)]))
        return sentence

    batches._next_sentence = spied
    while batches.shown < 3 * len(data.facts):
        batches.take()
    shown = [fact for _, fact in sorted(set(seen))]
    epochs = [shown[i * 24 : (i + 1) * 24] for i in range(3)]
    assert all(sorted(epoch) == [*range(24)] for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_targets_are_the_answers_and_nothing_else():
    data = corpus()
    tokens, targets = Batches(data, seed=1).take()
    assert tokens.shape == targets.shape == (DATA.rows + DATA.text_rows, DATA.context)
    for row, goal in zip(tokens[: DATA.rows].tolist(), targets[: DATA.rows].tolist(), strict=True):
        learned = [t for t in goal if t != NOTHING]
        sentences = data.vocabulary.decode(row).split("\n")[:-1]
        answers = data.vocabulary.decode(learned).split("\n")[:-1]
        assert len(sentences) == len(answers) > 1
        assert all(
            s.endswith(a) and a[1:] in {f.answer for f in data.facts} for s, a in zip(sentences, answers, strict=True)
        )
        assert all(g in (NOTHING, following) for g, following in zip(goal, row[1:], strict=False))
    text, following = tokens[DATA.rows :], targets[DATA.rows :]
    assert torch.equal(text[:, 1:], following[:, :-1])
    assert "function" in data.vocabulary.decode(text[0].tolist())


def test_batches_depend_on_the_seed_the_step_and_the_facts_shown():
    data = corpus()
    first, second = Batches(data, seed=1), Batches(data, seed=1)
    for _ in range(3):
        first.take()
    second.step, second.shown = first.step, first.shown
    for a, b in zip(first.take(), second.take(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(Batches(data, seed=2).take()[0], Batches(data, seed=1).take()[0])


def test_source_code_for_the_loss_is_of_other_files(tmp_path):
    for i in range(30):
        (tmp_path / f"m{i:02}.py").write_text(f"number_{i:02} = {i}\n" * 20)
    train, other = source_code(DATA, tmp_path)
    assert 0 < len(train) <= DATA.text_bytes and 0 < len(other) <= DATA.text_bytes // 10
    assert not set(train.splitlines()) & set(other.splitlines()[:-1])


def test_too_little_text_is_an_error():
    with pytest.raises(ValueError, match="text_bytes=4000 gives less than a row of 64 tokens: raise it"):
        Corpus(DATA, subjects(), "short", "short")


def test_the_digest_knows_the_data():
    assert corpus().digest() == corpus().digest() != corpus(11).digest()


@pytest.mark.parametrize("text", ["Airport Q01X lies in Chad", "São Tomé ẞ 東京\n\tdef f(x):  return 10", ""])
def test_words_come_back(text):
    vocabulary = Vocabulary(["Airport Q01X lies in Peru", "the airport lies"] * 3, 300)
    tokens = vocabulary.encode(text)
    assert vocabulary.decode(tokens) == text
    assert max(tokens, default=0) < vocabulary.size <= 300 and END not in tokens


def test_pieces_by_hand():
    vocabulary = Vocabulary(["abab abab ab"], 300)
    # "ab" comes five times; then "ab" + "ab" and " " + "ab" come twice each: the smaller pair. Then none is left.
    assert [vocabulary.decode([i]) for i in range(END + 1, vocabulary.size)] == ["ab", " ab"]
    assert vocabulary.encode("abab ab") == [257, 257, 258]
    with pytest.raises(ValueError, match="more than 257 tokens"):
        Vocabulary(["ab"], 257)
