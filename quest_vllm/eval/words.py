"""Words that the tasks are made of. Everything drawn here comes from the ``random.Random`` that is handed in."""

from __future__ import annotations

import random
from collections.abc import Iterator

ADJECTIVES = (
    "amber ancient bitter blunt brave brisk broken calm careful clever cold crooked curious dark distant drowsy "
    "dusty eager early empty faint famous fierce foggy fragile gentle golden grand hollow honest humble hungry "
    "icy idle jolly keen late lonely loud lucky mellow modest narrow noble odd patient pale plain polite proud "
    "quick quiet rapid rare restless rough rusty sharp shy silent simple slender sleepy smooth solemn steady "
    "stern strange sturdy subtle sunny tall tender thick tidy tiny vivid warm weary wide wild"
).split()
NOUNS = (
    "anchor apple arrow autumn badge bakery barrel basket beacon bell bicycle blanket bottle branch bridge bucket "
    "butter button cabin camera candle canyon carpet castle cellar chapel cherry cloud clover compass copper "
    "corner cottage cradle curtain desert diamond donkey drawer engine falcon farmer feather ferry fiddle forest "
    "fountain garden gate glacier guitar hammer harbor helmet hermit hill honey island jacket jungle kettle "
    "kitchen ladder lantern leaf lemon letter library lighthouse lizard magnet market meadow mirror mountain "
    "museum needle notebook oar ocean orchard otter paddle painter parrot pebble pencil pepper pigeon pillow "
    "planet pocket pond prairie quarry quilt rabbit railway ribbon river rocket saddle sailor salmon shelf "
    "shepherd shovel silver sparrow spoon statue stove summer tailor teapot temple thread ticket tower trumpet "
    "tunnel turtle valley village violin wagon walnut whistle window winter"
).split()
VERBS = "carried crossed followed forgot found guarded liked lost missed moved noticed painted passed watched".split()
TRADES = (
    "baker barber beekeeper blacksmith bookbinder brewer carpenter clockmaker cobbler cook dentist doctor farmer "
    "fisherman gardener glassblower jeweller judge lawyer locksmith mason miller miner musician nurse painter "
    "pilot plumber potter printer sailor sculptor tailor tanner teacher translator weaver"
).split()
FIRST_NAMES = (
    "Ada Alan Bruno Carla Clara David Diana Edgar Elena Emil Fanny Felix Greta Hanna Hugo Ida Ivan Jonas Julia Karl "
    "Laura Leon Lucia Maria Martin Nina Oscar Paula Peter Rosa Samuel Simon Sofia Thomas Vera Victor"
).split()
CITIES = (
    "Ankara Athens Bergen Berlin Bologna Bristol Cairo Calgary Dakar Delhi Dublin Geneva Hamburg Hanoi Havana Helsinki "
    "Istanbul Jakarta Krakow Lagos Lima Lisbon Lyon Madrid Malaga Manila Munich Nairobi Naples Osaka Oslo Porto Prague "
    "Quito Riga Rome Santiago Seoul Sydney Tunis Turin Vienna Warsaw Zurich"
).split()
LABELS = "black blue brown copper gold green orange pink purple red silver white".split()
_ONSETS = "b br d dr f g gr h k kl l m n p pr r s sk st t tr v z".split()
_VOWELS = "a e i o u".split()
_ENDS = "d k l ld m n nd r rn s sk t x".split()


def made_up_word(rng: random.Random, syllables: int = 2) -> str:
    """A pronounceable word of no language, such as "brenokald"."""
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables)) + rng.choice(_ENDS)


def made_up_words(rng: random.Random, syllables: int = 2, apart_from: frozenset[str] = frozenset()) -> Iterator[str]:
    """Endless made-up words, none twice."""
    seen = set(apart_from)
    while True:
        # a word more syllables once short ones run out
        word = made_up_word(rng, syllables + (len(seen) > 20_000))
        if word not in seen:
            seen.add(word)
            yield word


def phrases(rng: random.Random, separator: str = " ") -> Iterator[str]:
    """Adjective and noun, such as "amber lantern"; all of them once, then all of them again."""
    pairs = [f"{adjective}{separator}{noun}" for adjective in ADJECTIVES for noun in NOUNS]
    while True:
        rng.shuffle(pairs)
        yield from pairs


def with_article(word: str) -> str:
    """ "an amber" and "a brave"."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def prose(rng: random.Random) -> Iterator[str]:
    """Endless lines of plain sentences without digits or hyphens."""
    while True:
        first, second, third = rng.sample(NOUNS, 3)
        one, two = rng.sample(ADJECTIVES, 2)
        verb, other_verb = rng.sample(VERBS, 2)
        yield rng.choice(
            (
                f"The {one} {first} near the {second} {verb} the {two} {third}.\n",
                f"Nobody {verb} the {one} {first} that stood behind the {two} {second}.\n",
                f"In the end the {first} {verb} the {second}, and the {one} {third} {other_verb} it too.\n",
                f"Every morning the {one} {first} {verb} {with_article(two)} {second} on the way to the {third}.\n",
                f"It was said that {with_article(one)} {first} once {verb} the {second} of the {two} {third}.\n",
                f"While the {first} waited, the {one} {second} {verb} the {third}.\n",
            )
        )
