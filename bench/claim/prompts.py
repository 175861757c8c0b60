"""Compose short neutral prompts of subjects and requests; no subject is both trained on and measured on."""

from __future__ import annotations

import random

REQUESTS = [
    "Describe {} in one short sentence.",
    "Write one sentence about {}.",
    "In one sentence, tell me something about {}.",
    "What would a visitor say about {}? Answer in one sentence.",
    "Write a short caption for a photo of {}.",
    "Begin a story about {} with a single sentence.",
    "Give me one line for a diary about {}.",
    "Say in one sentence how {} changes over a day.",
]
SUBJECTS = [
    *("a kitchen table", "a bus stop", "a pencil", "a river", "an office", "a garden gate", "a library", "a bridge"),
    *("a train journey", "a bowl of soup", "a street in March", "a wooden chair", "a small shop", "a school yard"),
    *("a bicycle", "an old clock", "a walk to work", "a notebook", "a harbour", "a window", "a field of barley"),
    *("a suitcase", "a stone wall", "a waiting room", "a lamp", "a car park", "a pair of shoes", "a village square"),
    *("a loaf of bread", "a radio", "a staircase", "a rainy Tuesday", "a workshop", "a letter", "a market stall"),
    *("a cup of tea", "a ferry", "a roof", "a barn", "a printer", "a coat", "a corridor", "a telephone call"),
    *("a mirror", "a pond", "a weather report", "a lift", "a box of tools", "a museum", "a farm track"),
    *("a hotel lobby",),
    *("a newspaper", "a haircut", "a tram", "a basket of laundry", "a hill", "a kettle", "a meeting", "a parcel"),
    *("a bookshelf", "a fence", "an airport", "a bakery", "a key", "a bench in a park", "a lorry", "a map", "a sink"),
    *("a swimming pool", "a queue at a counter", "a balcony", "an umbrella", "a keyboard", "a cellar", "a tunnel"),
    *("a bag of apples", "a theatre", "a mill", "a jar of nails", "a crossroads", "a cat on a wall", "a curtain"),
]
OPENINGS = [
    *("Return", "Raise", "Create", "Check", "Set", "Get", "Make", "Use", "Find", "Print", "Read", "Write", "Call"),
    *("Add", "Remove", "Copy", "Open", "Close", "Test", "Send", "Start", "Stop", "Move", "Split", "Join", "Load"),
    *("Store", "Build", "Compare", "Convert", "Count", "Draw", "Fill", "Handle", "Insert", "List", "Match", "Parse"),
    *("Replace", "Search", "Skip", "Sort", "Update", "Wait"),
]
CONTINUATIONS = ["the", "a", "an object", "each item", "the file"]


def split(model: str, train: int, held_out: int) -> tuple[list[str], list[str]]:
    """Return the prompts to train on and the held-out prompts; the same numbers give the same prompts."""
    heads, tails = (SUBJECTS, REQUESTS) if model == "smollm2" else (OPENINGS, CONTINUATIONS)
    order = random.Random(0)
    shuffled = order.sample(heads, len(heads))
    cut = len(heads) * 3 // 4
    return _compose(shuffled[:cut], tails, train, order), _compose(shuffled[cut:], tails, held_out, order)


def _compose(heads: list[str], tails: list[str], count: int, order: random.Random) -> list[str]:
    """Return `count` different prompts of these heads and tails, in a random order."""
    every = [tail.format(head) if "{}" in tail else f"{head} {tail}" for head in heads for tail in tails]
    if count > len(every):
        raise ValueError(f"{count} prompts are too many: these subjects give {len(every)}")
    return order.sample(every, count)
