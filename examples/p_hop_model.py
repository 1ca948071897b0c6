"""A small looped model whose answers change from loop to loop, and questions for the faithfulness study.

    python examples/p_hop_model.py --output runs/p-hop                 # about two minutes
    looplm study faithfulness runs/p-hop/model --items runs/p-hop/items.jsonl --loops 6

Trains one layer looped four times on p-hop induction with 1 to 3 hops (the lab's task, model and training step). A hop
needs about a loop, so loops 1 to 4 give different answers to questions of 2 and 3 hops. The questions are held out, and
those whose answer is `a` or `b`: which of the two comes `<p>` hops back? Exact answers, no language.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from looplm.files import write_text
from looplm.lab.settings import RunSettings
from looplm.lab.tasks import Task
from looplm.lab.training import run
from looplm.model.modeling import OuroForCausalLM
from looplm.model.saving import require_new_folder
from looplm.training.tracking import Progress

CHOICES = ("a", "b")


@dataclass(frozen=True)
class Options:
    """What to do."""

    output: Path = Path("runs/p-hop")
    """new folder for model/ and items.jsonl"""
    steps: int = 1300
    """optimizer steps"""
    items: int = 1000
    """questions"""
    seed: int = 1
    """of the weights, the order of the data and the questions"""


def settings_of(options: Options) -> RunSettings:
    """The run: 1⊗4 of width 64, the loss of Stage I (equation 4), 1 to 3 hops."""
    levels = {"levels": (1, 2, 3), "test_levels": (1, 2, 3)}
    return RunSettings(
        task="p-hop",
        task_settings=levels,
        layers=1,
        loops=4,
        steps=options.steps,
        objective="expected",
        evaluations=1,
        seed=options.seed,
    )


def tokenizer_of(task: Task[Any]) -> PreTrainedTokenizerFast:
    """The task's vocabulary as a tokenizer: words between spaces."""
    words = Tokenizer(WordLevel(dict(task.ids), unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")


def questions(task: Task[Any], count: int, seed: int) -> list[dict[str, Any]]:
    """Held-out questions whose answer is one of `CHOICES`."""
    found: list[dict[str, Any]] = []
    index = 0
    while len(found) < count:
        batch = task.batch(seed, index, 64, "test")
        for tokens, targets, hops in zip(batch["tokens"], batch["targets"], batch["difficulty"], strict=True):
            answer = task.vocabulary[targets[-1]]
            if answer in CHOICES:
                prompt = " ".join(task.vocabulary[token] for token in tokens)
                category = f"{hops} hops" if hops > 1 else "1 hop"
                found.append({"prompt": prompt, "choices": CHOICES, "answer": answer, "category": category})
        index += 1
    return found[:count]


def main(options: Options) -> None:
    """Train, and write the model folder and the questions."""
    require_new_folder(str(options.output))
    settings = settings_of(options)
    task, folder = settings.make_task(), options.output / "model"
    lines = [json.dumps(question) for question in questions(task, options.items, options.seed)]

    def keep(model: OuroForCausalLM) -> None:
        model.save_pretrained(folder)
        tokenizer_of(task).save_pretrained(folder)

    with Progress(settings.steps, "training") as bar:
        rows = run(settings, lambda steps: bar.update(steps, steps * settings.batch * task.length), keep)
    write_text(options.output / "items.jsonl", "\n".join(lines) + "\n")
    for loop in range(1, settings.loops + 1):
        scores = {row["difficulty"]: row["score"] for row in rows if row["loop"] == loop}
        print(f"loop {loop}: " + ", ".join(f"{hops} hops {score:.3f}" for hops, score in sorted(scores.items())))
    print(f"written {folder} and {options.output}/items.jsonl")


if __name__ == "__main__":
    main(tyro.cli(Options))
