"""The generated corpora: spelling, inflection, determinism, and splits that share no number."""

from __future__ import annotations

from collections import Counter

import pytest

from examples.grammar import english, german, numbers, things

CARDINALS = {
    0: ("zero", "null"),
    1: ("one", "eins"),
    12: ("twelve", "zwölf"),
    16: ("sixteen", "sechzehn"),
    17: ("seventeen", "siebzehn"),
    21: ("twenty-one", "einundzwanzig"),
    30: ("thirty", "dreißig"),
    76: ("seventy-six", "sechsundsiebzig"),
    100: ("one hundred", "einhundert"),
    101: ("one hundred and one", "einhunderteins"),
    345: ("three hundred and forty-five", "dreihundertfünfundvierzig"),
    1000: ("one thousand", "eintausend"),
    1006: ("one thousand and six", "eintausendsechs"),
    21_000: ("twenty-one thousand", "einundzwanzigtausend"),
    101_001: ("one hundred and one thousand and one", "einhunderteintausendeins"),
    999_999: (
        "nine hundred and ninety-nine thousand nine hundred and ninety-nine",
        "neunhundertneunundneunzigtausendneunhundertneunundneunzig",
    ),
    1_000_000: ("one million", "eine Million"),
    1_000_001: ("one million and one", "eine Million eins"),
    2_345_678: (
        "two million three hundred and forty-five thousand six hundred and seventy-eight",
        "zwei Millionen dreihundertfünfundvierzigtausendsechshundertachtundsiebzig",
    ),
}
ORDINALS = {
    1: ("first", "erste"),
    2: ("second", "zweite"),
    3: ("third", "dritte"),
    7: ("seventh", "siebte"),
    8: ("eighth", "achte"),
    12: ("twelfth", "zwölfte"),
    19: ("nineteenth", "neunzehnte"),
    20: ("twentieth", "zwanzigste"),
    21: ("twenty-first", "einundzwanzigste"),
    100: ("one hundredth", "einhundertste"),
    103: ("one hundred and third", "einhundertdritte"),
    2001: ("two thousand and first", "zweitausenderste"),
    2_000_000: ("two millionth", "zweimillionste"),
}
YEARS = {
    1100: ("eleven hundred", "elfhundert"),
    1905: ("nineteen oh five", "neunzehnhundertfünf"),
    1945: ("nineteen forty-five", "neunzehnhundertfünfundvierzig"),
    2005: ("two thousand and five", "zweitausendfünf"),
    2024: ("twenty twenty-four", "zweitausendvierundzwanzig"),
}


def test_spelling() -> None:
    for n, words in CARDINALS.items():
        assert (english.cardinal(n), german.cardinal(n)) == words
    for n, words in ORDINALS.items():
        assert (english.ordinal(n), german.ordinal(n)) == words
    for n, words in YEARS.items():
        assert (english.year(n), german.year(n)) == words
    assert german.ordinal(3, "en") == "dritten"
    assert german.counting(1) == "ein" and german.counting(21) == "einundzwanzig" and german.counting(7) == "sieben"
    for wrong in (-1, 10_000_000):
        for spell in (english.cardinal, german.cardinal):
            with pytest.raises(ValueError, match=str(wrong)):
                spell(wrong)


def test_every_number_has_a_spelling_of_its_own() -> None:
    sample = [*range(20_000), *range(20_000, 10_000_000, 997)]
    for spell in (english.cardinal, german.cardinal):
        assert len({spell(n) for n in sample}) == len(sample)
    below = [n for n in sample if 0 < n < 1_000_000]
    for spell in (english.ordinal, german.ordinal):
        assert len({spell(n) for n in below}) == len(below)


SENTENCES = {
    "the third": "der dritte",
    "I have one apple.": "Ich habe einen Apfel.",
    "She has one card.": "Sie hat eine Karte.",
    "one euro": "ein Euro",
    "The clock costs one euro.": "Die Uhr kostet einen Euro.",
    "It is one o'clock.": "Es ist ein Uhr.",
    "at quarter to one": "um Viertel vor eins",
    "in the third street": "in der dritten Straße",
    "I see the third letter.": "Ich sehe den dritten Brief.",
    "I see the third page.": "Ich sehe die dritte Seite.",
}


def test_inflection() -> None:
    pairs = {p.english: p.german for p in numbers.generate("train", 40_000)}
    assert {e: pairs.get(e, g) for e, g in SENTENCES.items()} == SENTENCES
    assert sum(e in pairs for e in SENTENCES) >= 7


def test_held_out_numbers_are_held_out() -> None:
    sizes = {"train": 20_000, "validation": 1000, "test": 1000}
    splits = {split: numbers.generate(split, size) for split, size in sizes.items()}
    seen = {split: set().union(*(p.numbers for p in pairs)) for split, pairs in splits.items()}
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"] and numbers.split_of(345) == "test"
    # What a pair says it names is what it names: a spelled number of another split would stand in the text.
    words = {english.cardinal(n): n for n in range(10_000)}
    for split, pairs in splits.items():
        assert len({p.english for p in pairs}) == sizes[split]
        bare = [p for p in pairs if p.english in words]
        assert len(bare) > sizes[split] / 20
        assert all(p.numbers == {words[p.english]} and numbers.split_of(words[p.english]) == split for p in bare)
    # Every word form of the held-out sentences occurs in training.
    known = {w for p in splits["train"] for w in p.english.replace("-", " ").split()}
    assert {w for p in splits["test"] for w in p.english.replace("-", " ").split()} <= known


def test_corpus_is_deterministic_and_limited() -> None:
    assert numbers.generate("test", 50) == numbers.generate("test", 100)[:50]
    assert numbers.generate("test", 50, seed=1) != numbers.generate("test", 50)
    with pytest.raises(ValueError, match="dev"):
        numbers.generate("dev", 1)


def test_things() -> None:
    names = [thing for kind in things.KINDS.values() for thing in kind]
    assert len(names) == len(set(names)) == 180
    pairs = things.labelled(600)
    assert set(Counter(kind for kind, _ in pairs).values()) == {100} and len({s for _, s in pairs}) == 600
    for kind, sentence in pairs:
        words = sentence.rstrip(".?").split()
        assert len([w for w in words if w in things.KINDS[kind]]) == 1, sentence
    other = things.labelled(300, 1, exclude=[s for _, s in pairs])
    assert not {s for _, s in pairs} & {s for _, s in other}
    text = " ".join(s for d in things.documents(300) for s in d)
    assert " a apple" not in text and "{" not in text
    assert " a axe" not in text and "A owl" not in text
