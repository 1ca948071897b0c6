"""Synthetic question pairs for the faithfulness study, where the real ones are not to be had.

    python examples/synthetic_pairs.py runs/pairs.csv --count 240
    looplm study faithfulness runs/retrofit/model --items runs/pairs.csv

The paper asks whether two questions of Quora's pairs have the same intent. These are made of templates: the same
request in other words (is_duplicate 1), or with another verb or thing in it (0). They have the columns of the real file
and are far easier for a person; results on them are results on templates.
"""

import csv
import io
import random
from dataclasses import dataclass
from pathlib import Path

import tyro

from looplm.files import write_text

FORMS = (
    "How can I {verb} a {thing}?",
    "What is the best way to {verb} a {thing}?",
    "How do I {verb} a {thing}?",
    "What should I do to {verb} a {thing}?",
    "Which steps does it take to {verb} a {thing}?",
)
VERBS = ("buy", "sell", "repair", "clean", "build", "paint", "move", "choose")
THINGS = ("house", "car", "bicycle", "phone", "piano", "table", "camera", "boat", "clock", "garden")


@dataclass(frozen=True)
class Options:
    """What to write."""

    path: tyro.conf.Positional[Path]
    """CSV file with question1, question2, is_duplicate"""
    count: int = 240
    """pairs, half of them duplicates"""
    seed: int = 0
    """of the drawing"""


def pair(draw: random.Random, same: bool) -> tuple[str, str]:
    """Two questions in different forms; those that are not the same differ in the verb or in the thing."""
    first, second = draw.sample(FORMS, 2)
    verb, other_verb = draw.sample(VERBS, 2)
    thing, other_thing = draw.sample(THINGS, 2)
    told = {"verb": verb, "thing": thing}
    if same:
        return first.format(**told), second.format(**told)
    changed = {"verb": other_verb} if draw.random() < 0.5 else {"thing": other_thing}
    return first.format(**told), second.format(**{**told, **changed})


def main(options: Options) -> None:
    """Write the pairs, duplicates and others in turn."""
    draw, text = random.Random(options.seed), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("id", "question1", "question2", "is_duplicate"))
    for number in range(options.count):
        same = number % 2 == 0
        writer.writerow((number + 1, *pair(draw, same), int(same)))
    write_text(options.path, text.getvalue())
    print(f"written {options.path}: {options.count} pairs")


if __name__ == "__main__":
    main(tyro.cli(Options))
