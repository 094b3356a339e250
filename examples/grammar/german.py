"""German number words: cardinals below ten million, ordinals with their endings, years."""

from __future__ import annotations

# "eins" stands alone and at the end of a number, "ein" before what it counts (hundert, und, Uhr).
UNITS = (
    "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn "
    "achtzehn neunzehn"
).split()
TENS = "- - zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()
IRREGULAR = {1: "erst", 3: "dritt", 7: "siebt", 8: "acht"}
MONTHS = "Januar Februar März April Mai Juni Juli August September Oktober November Dezember".split()
WEEKDAYS = "Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag".split()


def cardinal(n: int) -> str:
    """345 -> "dreihundertfünfundvierzig", for 0 <= n < 10,000,000; one word below a million."""
    if not 0 <= n < 10_000_000:
        raise ValueError(f"numbers are spelled from 0 to 9,999,999, got {n}")
    millions, rest = divmod(n, 1_000_000)
    if not millions:
        return _below_million(n)
    head = "eine Million" if millions == 1 else f"{UNITS[millions]} Millionen"
    return f"{head} {_below_million(rest)}" if rest else head


def _below_million(n: int) -> str:
    if n < 20:
        return UNITS[n]
    if n < 100:
        tens, unit = divmod(n, 10)
        return (f"{counting(unit)}und" if unit else "") + TENS[tens]
    size, name = (1000, "tausend") if n >= 1000 else (100, "hundert")
    head, rest = divmod(n, size)
    return counting(head) + name + (_below_million(rest) if rest else "")


def counting(n: int) -> str:
    """The cardinal before what it counts: "ein", "einhundertein" (Tausend); else as :func:`cardinal`."""
    return cardinal(n).removesuffix("s") if n % 100 == 1 else cardinal(n)


def ordinal(n: int, ending: str = "e") -> str:
    """345 -> "dreihundertfünfundvierzigste"; ``ending`` is "e" (der dritte) or "en" (am dritten, den dritten).

    Below a million, and whole millions ("zweimillionste"): usage does not settle how the others are joined.
    """
    if n >= 1_000_000:
        if n % 1_000_000:
            raise ValueError(f"ordinals are spelled below a million and for whole millions, got {n}")
        return f"{counting(n // 1_000_000)}millionst{ending}"
    last = n % 100
    if 0 < last < 20:
        stem = cardinal(n).removesuffix(UNITS[last]) + IRREGULAR.get(last, UNITS[last] + "t")
    else:
        stem = cardinal(n) + "st"
    return stem + ending


def year(n: int) -> str:
    """1945 -> "neunzehnhundertfünfundvierzig", 2005 -> "zweitausendfünf"."""
    century, rest = divmod(n, 100)
    if not 11 <= century <= 19:
        return cardinal(n)
    return f"{cardinal(century)}hundert" + (cardinal(rest) if rest else "")
