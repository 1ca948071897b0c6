"""A tiny corpus and recipe that train in about a second: what the tests of the training wing and the CLI share."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from looplm.data.pipeline import EncodedCorpus
from looplm.data.tokenizers import train_bpe
from looplm.model.configuration import OuroConfig
from looplm.model.modeling import OuroForCausalLM
from looplm.training.recipe import Recipe

WORDS = "the union of states shall people congress make law peace and war with hope for every citizen".split()


def write_corpus(folder: Path, documents: int = 12) -> Path:
    """Text files of random sentences over 17 words, the same at every call."""
    folder.mkdir(parents=True)
    for index in range(documents):
        draw = random.Random(index)
        lines = [" ".join(draw.choices(WORDS, k=12)) + ".\n" for _ in range(8)]
        (folder / f"{index:02}.txt").write_text("".join(lines))
    return folder


def small_values(folder: Path, **sections: dict[str, Any] | Any) -> dict[str, Any]:
    """A recipe's values: 2 layers of width 32, 3 loops, one stage of 12 steps, over the corpus written to `folder`.

    A dictionary changes keys of its section; `stage` is the only stage, `stages` replaces it by a list.
    """
    corpus = folder / "corpus"
    values: dict[str, Any] = {
        "output": str(folder / "out"),
        "seed": 3,
        "data": {"sources": {"words": {"location": str(corpus)}}, "validation_every": 6},
        "tokenizer": {"train_bpe": 300},
        "model": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 2,
            "total_ut_steps": 3,
            "max_position_embeddings": 64,
        },
        "defaults": {
            "sequence_length": 32,
            "batch_tokens": 128,
            "micro_batch_size": 4,
            "warmup_steps": 3,
            "learning_rate": 3e-3,
            "evaluations": 2,
            "compile": "off",
            "autocast": "none",
        },
        "stage": {"name": "only", "steps": 12},
    }
    for name, changes in sections.items():
        values[name] = {**values[name], **changes} if isinstance(changes, dict) else changes
    values["stages"] = values.get("stages", [values["stage"]])
    del values["stage"]
    if not corpus.exists():
        write_corpus(corpus)
    return copy.deepcopy(values)


def small_recipe(folder: Path, **sections: dict[str, Any] | Any) -> Recipe:
    """The checked recipe of `small_values`."""
    return Recipe.validated(small_values(folder, **sections), "small")


def small_model(**fields: Any) -> OuroForCausalLM:
    """A fresh fp32 model over 40 tokens; seed torch before."""
    defaults: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "total_ut_steps": 3,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    return OuroForCausalLM(OuroConfig(**{**defaults, **fields}))


def save_small_pair(folder: Path, text: str, gain: float = 1) -> Path:
    """A random model of 3 loops and a context of 64 tokens, with a tokenizer of `text`, in a folder.

    `gain` multiplies the matrices: with more than 1 the loops differ in what they say.
    """
    tokenizer = train_bpe([text * 4], 300)
    torch.manual_seed(0)
    model = small_model(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(gain)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def encoded(lengths: list[int], seed: int = 0, characters: int = 1000) -> EncodedCorpus:
    """Documents of the given lengths: token 0, then a walk over 1..39 that mostly counts up (so it can be learnt)."""
    generator = np.random.default_rng(seed)
    documents = []
    for length in lengths:
        steps = generator.choice([1, 2, 7], size=length - 1, p=[0.8, 0.1, 0.1])
        documents.append(np.concatenate(([0], 1 + np.cumsum(steps) % 39)))
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    return EncodedCorpus(np.concatenate(documents).astype(np.uint16), offsets, characters)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON Lines file; every line has to be valid JSON."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
