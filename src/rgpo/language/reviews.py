"""A tiny world of small talk: questions about things, and answers that praise, blame or neither.

Text without end for a policy that is trained from scratch in seconds. Answers are made by a few
patterns; their adjectives are drawn as one quarter praise, one quarter blame, one half neither.
"""

import random
from typing import Any

THINGS = {
    "film": ("plot", "acting", "music", "ending"),
    "book": ("story", "style", "beginning", "ending"),
    "hotel": ("room", "breakfast", "pool", "staff"),
    "meal": ("soup", "fish", "bread", "wine"),
    "concert": ("music", "sound", "crowd", "singer"),
    "trip": ("weather", "train", "food", "view"),
    "game": ("story", "music", "beginning", "sound"),
    "phone": ("screen", "sound", "camera", "price"),
    "course": ("teacher", "room", "beginning", "price"),
    "party": ("music", "food", "crowd", "wine"),
    "museum": ("staff", "view", "crowd", "price"),
    "garden": ("view", "weather", "crowd", "pool"),
    "play": ("acting", "plot", "ending", "crowd"),
    "car": ("sound", "price", "camera", "style"),
    "house": ("view", "price", "style", "pool"),
    "show": ("singer", "acting", "ending", "sound"),
}
QUESTIONS = (
    "how was the {} ?",
    "tell me about the {} .",
    "what did you think of the {} ?",
    "did you like the {} ?",
    "describe the {} .",
    "is the {} any good ?",
)
PRAISE = ("great", "wonderful", "lovely", "good", "nice", "excellent")
BLAME = ("bad", "terrible", "awful", "boring", "horrible", "poor")
NEITHER = ("long", "short", "usual", "small", "quiet", "simple", "old", "new")
VERBS = ("liked", "hated", "loved", "saw", "remember", "enjoyed")
PATTERNS = (
    "the {a} was {x} and the {b} was {y} .",
    "it was {x} , but the {a} was {y} .",
    "i {v} the {t} because the {a} was {x} .",
    "we {v} it . the {a} was not {x} .",
    "the {a} was very {x} . i {v} it .",
    "the {t} was {x} .",
)


def questions() -> list[str]:
    """Every question, in one fixed random order."""
    found = [question.format(thing) + " " for thing in THINGS for question in QUESTIONS]
    random.Random(0).shuffle(found)
    return found


def conversations(count: int, seed: int) -> list[dict[str, Any]]:
    """Questions with an answer each: rows of prompt and completion."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        thing = draw.choice(list(THINGS))
        first, second = draw.sample(THINGS[thing], 2)
        answer = draw.choice(PATTERNS).format(
            a=first, b=second, t=thing, v=draw.choice(VERBS), x=_adjective(draw), y=_adjective(draw)
        )
        found.append({"prompt": draw.choice(QUESTIONS).format(thing) + " ", "completion": answer})
    return found


def vocabulary() -> list[str]:
    """Every word that occurs."""
    aspects = [name for names in THINGS.values() for name in names]
    text = " ".join((*QUESTIONS, *PATTERNS, *THINGS, *aspects, *PRAISE, *BLAME, *NEITHER, *VERBS))
    return sorted({word for word in text.split() if "{" not in word})


def _adjective(draw: random.Random) -> str:
    return draw.choice(draw.choice((PRAISE, BLAME, NEITHER, NEITHER)))
