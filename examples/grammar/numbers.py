"""English-German sentence pairs about numbers: cardinals, ordinals, dates, clock times, prices, simple sentences.

Every translation is determined by its source: where English leaves something open, one form is chosen for good
(formal clock, "du", "einhundert" rather than "hundert"; no "half past six", whose "halb sieben" names the next hour).
Every integer belongs to one split, so what is held out shares no number with training. 0 and 1 always train: no longer
number contains their forms.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple, TypeVar

from examples.grammar import english as en
from examples.grammar import german as de

T = TypeVar("T")

SPLITS = ("train", "validation", "test")
#: Below a hundred every word form must remain in training inside longer numbers; these are held out by hand.
HELD_OUT = {
    "validation": {4, 11, 19, 22, 27, 38, 46, 54, 65, 73, 89, 92},
    "test": {6, 7, 13, 18, 24, 29, 35, 43, 52, 68, 71, 86, 97},
}
LARGEST = 9_999_999


class Pair(NamedTuple):
    """A sentence in both languages and the integers that it names."""

    english: str
    german: str
    numbers: frozenset[int]


class Noun(NamedTuple):
    english: str
    english_plural: str
    gender: str  # m, f, n
    german: str
    german_plural: str


NOUNS = [
    Noun(*line.split())
    for line in (
        "book books n Buch Bücher", "apple apples m Apfel Äpfel", "card cards f Karte Karten",
        "house houses n Haus Häuser", "chair chairs m Stuhl Stühle", "bottle bottles f Flasche Flaschen",
        "letter letters m Brief Briefe", "picture pictures n Bild Bilder", "tree trees m Baum Bäume",
        "flower flowers f Blume Blumen", "stone stones m Stein Steine", "coin coins f Münze Münzen",
        "cow cows f Kuh Kühe", "horse horses n Pferd Pferde", "egg eggs n Ei Eier", "star stars m Stern Sterne",
        "shirt shirts n Hemd Hemden", "ship ships n Schiff Schiffe", "key keys m Schlüssel Schlüssel",
        "clock clocks f Uhr Uhren",
    )
]  # fmt: skip
ORDERED = [
    Noun(*line.split())
    for line in (
        "page pages f Seite Seiten", "day days m Tag Tage", "chapter chapters n Kapitel Kapitel",
        "letter letters m Brief Briefe", "street streets f Straße Straßen", "house houses n Haus Häuser",
        "question questions f Frage Fragen", "picture pictures n Bild Bilder",
    )
]  # fmt: skip
NOMINATIVE = {"m": "der", "f": "die", "n": "das"}
ACCUSATIVE = {"m": "den", "f": "die", "n": "das"}
DATIVE_IN = {"m": "im", "f": "in der", "n": "im"}
ONE_ACCUSATIVE = {"m": "einen", "f": "eine", "n": "ein"}
#: English and German pronoun, and which verb form each takes.
SUBJECTS = [
    ("I", "Ich", 0, 0), ("You", "Du", 0, 1), ("He", "Er", 1, 2), ("She", "Sie", 1, 2), ("We", "Wir", 0, 3),
    ("They", "Sie", 0, 3),
]  # fmt: skip
VERBS = [
    (("have", "has"), ("habe", "hast", "hat", "haben")),
    (("buy", "buys"), ("kaufe", "kaufst", "kauft", "kaufen")),
    (("see", "sees"), ("sehe", "siehst", "sieht", "sehen")),
    (("count", "counts"), ("zähle", "zählst", "zählt", "zählen")),
    (("need", "needs"), ("brauche", "brauchst", "braucht", "brauchen")),
    (("find", "finds"), ("finde", "findest", "findet", "finden")),
]
PAY = (("pay", "pays"), ("zahle", "zahlst", "zahlt", "zahlen"))
PLACES = [
    ("in the house", "Im Haus"), ("in the garden", "Im Garten"), ("in the kitchen", "In der Küche"),
    ("in the city", "In der Stadt"), ("in the school", "In der Schule"), ("in the museum", "Im Museum"),
]  # fmt: skip
EVENTS = [
    ("concert", "Das Konzert"), ("exam", "Die Prüfung"), ("meeting", "Das Treffen"), ("wedding", "Die Hochzeit"),
    ("lesson", "Der Unterricht"), ("journey", "Die Reise"),
]  # fmt: skip


@cache
def split_of(n: int) -> str:
    """The split that an integer belongs to. From a hundred on, one in twenty each is held out by a hash."""
    if n < 100:
        return next((split for split, members in HELD_OUT.items() if n in members), "train")
    slot = hashlib.blake2b(f"number {n}".encode(), digest_size=1).digest()[0] % 20
    return {15: "test", 16: "validation"}.get(slot, "train")


@cache
def _members(split: str, low: int, high: int) -> Sequence[int]:
    return [n for n in range(low, high + 1) if split_of(n) == split]


class Draw:
    """Random choices for one pair; every integer it hands out is of its split, and noted."""

    def __init__(self, rng: random.Random, split: str) -> None:
        self.rng = rng
        self.split = split
        self.numbers: set[int] = set()

    def choice(self, options: Sequence[T]) -> T:
        return self.rng.choice(options)

    def within(self, low: int, high: int) -> int:
        """An integer of a short range, each as likely."""
        n = self.rng.choice(_members(self.split, low, high))
        self.numbers.add(n)
        return n

    def number(self, low: int = 0, high: int = LARGEST) -> int:
        """An integer of any size: each number of digits is as likely."""
        while True:
            digits = self.rng.randint(len(str(low)), len(str(high)))
            n = self.rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)
            if low <= n <= high and split_of(n) == self.split:
                self.numbers.add(n)
                return n


Text = tuple[str, str]


def cardinals(draw: Draw) -> Text:
    n = draw.number()
    return en.cardinal(n), de.cardinal(n)


def ordinals(draw: Draw) -> Text:
    n = draw.number(1, 999_999)
    if draw.split == "train" and draw.rng.random() < 0.01:
        n = 1_000_000 * draw.rng.randint(2, 9)
        if split_of(n) != "train":
            n = 1_000_000
        draw.numbers = {n}
    if draw.rng.random() < 0.4:
        return en.ordinal(n), de.ordinal(n)
    return f"the {en.ordinal(n)}", f"der {de.ordinal(n)}"


def ordered_nouns(draw: Draw) -> Text:
    n, noun = draw.number(1, 999_999), draw.choice(ORDERED)
    first = en.ordinal(n)
    kind = draw.rng.randrange(4)
    if kind == 0:
        article = NOMINATIVE[noun.gender]
        return f"This is the {first} {noun.english}.", f"Das ist {article} {de.ordinal(n)} {noun.german}."
    if kind == 1:
        article, ending = ACCUSATIVE[noun.gender], "en" if noun.gender == "m" else "e"
        return f"I see the {first} {noun.english}.", f"Ich sehe {article} {de.ordinal(n, ending)} {noun.german}."
    if kind == 2:
        article = DATIVE_IN[noun.gender]
        return f"in the {first} {noun.english}", f"{article} {de.ordinal(n, 'en')} {noun.german}"
    article = NOMINATIVE[noun.gender]
    return f"the {first} {noun.english}", f"{article} {de.ordinal(n)} {noun.german}"


def _date(draw: Draw, ending: str, with_year: bool) -> Text:
    day, month = draw.within(1, 31), draw.rng.randrange(12)
    english, german = f"{en.ordinal(day)} of {en.MONTHS[month]}", f"{de.ordinal(day, ending)} {de.MONTHS[month]}"
    if with_year:
        year = draw.within(1100, 2099)
        return f"{english} {en.year(year)}", f"{german} {de.year(year)}"
    return english, german


def dates(draw: Draw) -> Text:
    kind, with_year = draw.rng.randrange(6), draw.rng.random() < 0.7
    weekday = draw.rng.randrange(7)
    english, german = _date(draw, "e" if kind < 2 else "en", with_year)
    if kind == 0:
        return f"the {english}", f"der {german}"
    if kind == 1:
        return f"Today is {en.WEEKDAYS[weekday]}, the {english}.", f"Heute ist {de.WEEKDAYS[weekday]}, der {german}."
    if kind == 2:
        return f"on the {english}", f"am {german}"
    if kind == 3:
        event, ereignis = draw.choice(EVENTS)
        return f"The {event} is on the {english}.", f"{ereignis} ist am {german}."
    if kind == 4:
        who, wer = draw.choice([("He", "Er"), ("She", "Sie")])
        return f"{who} was born on the {english}.", f"{wer} wurde am {german} geboren."
    return f"on {en.WEEKDAYS[weekday]}, the {english}", f"am {de.WEEKDAYS[weekday]}, dem {german}"


def _clock(draw: Draw) -> Text:
    """A time of day, formal or in minutes past and to the hour."""
    kind = draw.rng.randrange(4)
    if kind == 0:
        hour = draw.within(1, 23)
        return f"{en.cardinal(hour)} o'clock", f"{de.counting(hour)} Uhr"
    if kind == 1:
        hour, minute = draw.within(1, 23), draw.within(1, 59)
        oh = "oh " if minute < 10 else ""
        return f"{en.cardinal(hour)} {oh}{en.cardinal(minute)}", f"{de.counting(hour)} Uhr {de.cardinal(minute)}"
    side, seite = draw.choice([("past", "nach"), ("to", "vor")])
    hour = draw.within(1, 12)
    if kind == 2:
        return f"quarter {side} {en.cardinal(hour)}", f"Viertel {seite} {de.cardinal(hour)}"
    minute = draw.within(2, 29)
    return (
        f"{en.cardinal(minute)} minutes {side} {en.cardinal(hour)}",
        f"{de.cardinal(minute)} Minuten {seite} {de.cardinal(hour)}",
    )


def times(draw: Draw) -> Text:
    english, german = _clock(draw)
    kind = draw.rng.randrange(4)
    if kind == 0:
        return f"at {english}", f"um {german}"
    if kind == 1:
        return f"It is {english}.", f"Es ist {german}."
    if kind == 2:
        vehicle, fahrzeug = draw.choice([("train", "Der Zug"), ("bus", "Der Bus"), ("ship", "Das Schiff")])
        return f"The {vehicle} leaves at {english}.", f"{fahrzeug} fährt um {german} ab."
    event, ereignis = draw.choice(EVENTS)
    return f"The {event} begins at {english}.", f"{ereignis} beginnt um {german}."


def _price(draw: Draw, one: str) -> Text:
    """Euros, with or without cents; ``one`` is "ein" or, in the accusative, "einen"."""
    euros, cents = draw.number(1, 99_999), draw.within(1, 99) if draw.rng.random() < 0.7 else 0
    english = "one euro" if euros == 1 else f"{en.cardinal(euros)} euros"
    german = f"{one if euros == 1 else de.cardinal(euros)} Euro"
    if cents:
        english += " and one cent" if cents == 1 else f" and {en.cardinal(cents)} cents"
        german += f" und {one if cents == 1 else de.cardinal(cents)} Cent"
    return english, german


def prices(draw: Draw) -> Text:
    kind, noun = draw.rng.randrange(3), draw.choice(NOUNS)
    english, german = _price(draw, "ein" if kind == 0 else "einen")
    if kind == 0:
        return english, german
    if kind == 1:
        return (
            f"The {noun.english} costs {english}.",
            f"{NOMINATIVE[noun.gender].capitalize()} {noun.german} kostet {german}.",
        )
    who, wer, form, person = draw.choice(SUBJECTS)
    return (
        f"{who} {PAY[0][form]} {english} for the {noun.english}.",
        f"{wer} {PAY[1][person]} {german} für {ACCUSATIVE[noun.gender]} {noun.german}.",
    )


def _counted(draw: Draw) -> tuple[int, str, str]:
    """So many things, in the accusative."""
    n, noun = draw.number(1), draw.choice(NOUNS)
    if n == 1:
        return n, f"one {noun.english}", f"{ONE_ACCUSATIVE[noun.gender]} {noun.german}"
    return n, f"{en.cardinal(n)} {noun.english_plural}", f"{de.cardinal(n)} {noun.german_plural}"


def sentences(draw: Draw) -> Text:
    n, english, german = _counted(draw)
    kind = draw.rng.randrange(3)
    if kind == 0:
        who, wer, form, person = draw.choice(SUBJECTS)
        verb, verb_german = draw.choice(VERBS)
        return f"{who} {verb[form]} {english}.", f"{wer} {verb_german[person]} {german}."
    if kind == 1:
        place, ort = draw.choice(PLACES)
        return f"There {'is' if n == 1 else 'are'} {english} {place}.", f"{ort} gibt es {german}."
    year = draw.within(1100, 2099)
    return f"In {en.year(year)} they sold {english}.", f"Im Jahr {de.year(year)} verkauften sie {german}."


#: How often each kind of pair is drawn.
KINDS: dict[Callable[[Draw], Text], int] = {
    cardinals: 30, ordinals: 10, ordered_nouns: 8, dates: 14, times: 8, prices: 12, sentences: 18,
}  # fmt: skip


def generate(split: str, count: int, seed: int = 0) -> list[Pair]:
    """``count`` distinct pairs of a split, the same ones for the same seed.

    Raises:
        ValueError: no such split.
        RuntimeError: the split has too few distinct pairs.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    rng = random.Random(f"{split} {seed}")
    kinds, weights = list(KINDS), list(KINDS.values())
    pairs: dict[str, Pair] = {}
    for _ in range(20 * count + 1000):
        if len(pairs) == count:
            return list(pairs.values())
        draw = Draw(rng, split)
        english, german = rng.choices(kinds, weights)[0](draw)
        pairs.setdefault(english, Pair(english, german, frozenset(draw.numbers)))
    raise RuntimeError(f"the grammar gave only {len(pairs)} distinct {split} pairs, {count} were asked for")
