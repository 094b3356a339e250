"""English sentences about everyday things of six kinds: plain text to pre-train on, and a small task to be taught.

Half of what is said of a thing tells its kind (one rides in a tram, a tram does not sleep), half is true of anything.
The labelled sentences say only the latter: what kind of thing is it? Who has read the plain text can know; who has not
must be told thing by thing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from examples.grammar import english

KINDS: dict[str, list[str]] = {
    "animal": (
        "cat dog horse cow sheep goat pig mouse rabbit fox wolf bear lion tiger monkey donkey camel deer duck goose "
        "hen eagle owl frog snake turtle otter beaver badger hedgehog"
    ).split(),
    "food": (
        "bread cheese soup cake apple pear plum cherry carrot potato onion cabbage bean pie sausage ham pancake "
        "omelette porridge biscuit noodle dumpling salad sandwich waffle pudding tomato cucumber pumpkin mushroom"
    ).split(),
    "tool": (
        "hammer chainsaw drill axe chisel wrench screwdriver shovel rake hoe spade crowbar trowel ladder brush knife "
        "needle anvil clamp mallet pickaxe sickle scythe lathe pliers tongs jack pulley winch sander"
    ).split(),
    "garment": (
        "shirt coat hat scarf glove sock shoe boot dress skirt jacket sweater belt tie cap blouse vest cloak apron "
        "sandal slipper gown robe shawl mitten stocking tunic kilt bonnet cardigan"
    ).split(),
    "vehicle": (
        "car bus train truck bicycle tram ship boat ferry helicopter tractor van taxi scooter motorcycle canoe yacht "
        "sled wagon carriage lorry submarine raft barge ambulance trolley rocket kayak airship limousine"
    ).split(),
    "instrument": (
        "piano violin guitar flute drum trumpet harp cello organ oboe clarinet trombone tuba banjo lute accordion "
        "harmonica bagpipe mandolin saxophone xylophone viola bassoon cymbal tambourine ukulele zither horn fiddle gong"
    ).split(),
}
#: True of one kind only. {} is the thing.
TELLING: dict[str, list[str]] = {
    "animal": [
        "The {} sleeps in the barn.", "The {} runs through the forest.", "The {} had young ones in spring.",
        "We feed the {} every morning.", "The {} drinks from the river.", "A hungry {} came out of the woods.",
        "The {} hides from the hunter.", "Somebody strokes the {} gently.",
    ],
    "food": [
        "We eat the {} for dinner.", "The {} tastes sweet.", "She cooks the {} in the kitchen.",
        "A fresh {} smells good.",
        "He cut the {} and put it on his plate.", "The {} needs more salt.", "The {} is too hot to swallow.",
        "The guests liked the {} and asked for the recipe.",
    ],
    "tool": [
        "The carpenter works with the {}.", "He repairs the fence with the {}.", "The {} hangs in the workshop.",
        "You need a {} to fix it.", "She sharpened the {} and oiled it.", "The {} broke at work.",
        "The smith made a {} of steel.", "Put the {} back into the toolbox.",
    ],
    "garment": [
        "She wears the {} to the party.", "The {} is made of wool.", "He took off the {} because it was warm.",
        "The tailor mended the {}.", "The {} fits me well.", "Wash the {} and iron it.",
        "The {} has two buttons.", "I put on a {} against the cold.",
    ],
    "vehicle": [
        "We travel to the city in the {}.", "The {} leaves from the station.", "The driver stopped the {}.",
        "The {} carries forty passengers.", "The engine of the {} is loud.", "She got into the {} and went away.",
        "The {} was late because of the traffic.", "The {} arrived at the harbour.",
    ],
    "instrument": [
        "She plays the {} in the orchestra.", "The sound of the {} filled the hall.", "He practises the {} every day.",
        "The {} is out of tune.", "A melody on the {} began.", "The musician tuned the {} before the concert.",
        "The teacher gave a lesson on the {}.", "The {} accompanies the singer.",
    ],
}  # fmt: skip
#: True of anything. {n} is a number.
NEUTRAL = [
    "I saw the {} yesterday.", "The {} is in the picture.", "He talked about the {} for {n} minutes.",
    "The {} costs {n} euros.", "My brother bought a {}.", "There is a {} behind the house.",
    "She looked at the {} at {n} o'clock.", "This {} is bigger than that one.", "We found the {} on the {th} day.",
    "Number {n} is the {}.", "They sold the {} in the market.", "The {} belongs to my neighbour.",
    "Where is the {}?", "The child drew a {}.", "I have never seen such a {}.",
]  # fmt: skip


def _say(rng: random.Random, template: str, thing: str) -> str:
    n = rng.randint(2, 99)
    text = template.replace("{n}", english.cardinal(min(n, 12) if "o'clock" in template else n))
    article = "an" if thing[0] in "aeiou" and not thing.startswith("uk") else "a"
    text = text.replace(" a {}", f" {article} {{}}").replace("A {}", f"{article.capitalize()} {{}}")
    return text.replace("{th}", english.ordinal(n)).replace("{}", thing)


def documents(count: int, seed: int = 0) -> list[list[str]]:
    """``count`` documents of three to five sentences, each document about one thing."""
    rng = random.Random(f"documents {seed}")
    result = []
    for _ in range(count):
        kind = rng.choice(list(KINDS))
        thing = rng.choice(KINDS[kind])
        pools = [TELLING[kind] if rng.random() < 0.5 else NEUTRAL for _ in range(rng.randint(3, 5))]
        result.append([_say(rng, rng.choice(pool), thing) for pool in pools])
    return result


def labelled(count: int, seed: int = 0, exclude: Sequence[str] = ()) -> list[tuple[str, str]]:
    """``count`` distinct pairs ``(kind, neutral sentence)``, kinds in turn; none of the sentences of ``exclude``."""
    rng = random.Random(f"labelled {seed}")
    kinds, seen = list(KINDS), set(exclude)
    result: list[tuple[str, str]] = []
    while len(result) < count:
        kind = kinds[len(result) % len(kinds)]
        sentence = _say(rng, rng.choice(NEUTRAL), rng.choice(KINDS[kind]))
        if sentence not in seen:
            seen.add(sentence)
            result.append((kind, sentence))
    return result
