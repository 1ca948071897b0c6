"""A tiny model with a real tokenizer, and small tasks: what the tests of the harness share."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_model
from transformers import PreTrainedTokenizerFast

from looplm.data.tokenizers import train_bpe
from looplm.model.modeling import OuroForCausalLM

TEXT = "the union of states shall make law peace and war with hope for every citizen in the year 1776 and after. "


@cache
def small_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 entries with ChatML."""
    return train_bpe([TEXT] * 4, 300)


def small_pair(**overrides: Any) -> tuple[OuroForCausalLM, PreTrainedTokenizerFast]:
    """A random model in fp32, large enough in its weights that loops differ, and the tokenizer."""
    overrides = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": 512, **overrides}
    return tiny_model(**overrides).float(), small_tokenizer()


def save_pair(folder: Path, **overrides: Any) -> Path:
    """A model folder."""
    model, tokenizer = small_pair(**overrides)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    """A JSON Lines file."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def choice_records(count: int = 24) -> list[dict[str, Any]]:
    """Multiple choice with choices of one and of several tokens, in two categories."""
    words = ["union", "states", "law and peace", "every citizen in the year", "hope"]
    return [
        {
            "id": f"q{n}",
            "question": f"In the year {1700 + 7 * n} the {words[n % 5]} shall make",
            "choices": [words[(n + k) % 5] for k in range(2 + n % 3)],
            "answer": n % 2,
            "category": "odd" if n % 2 else "even",
        }
        for n in range(count)
    ]


def question_records(count: int = 6) -> list[dict[str, Any]]:
    """Questions with free answers."""
    return [{"question": f"What shall the union make in {1700 + n}? Answer:", "answer": "law"} for n in range(count)]


def random_requests(count: int, seed: int = 0, vocab: int = 64) -> list[tuple[list[int], list[int]]]:
    """Contexts of 1 to 9 tokens and targets of 1 to 4; some share their inputs."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(most: int) -> list[int]:
        length = int(torch.randint(1, most + 1, (), generator=draw))
        return torch.randint(3, vocab, (length,), generator=draw).tolist()

    requests = [(tokens(9), tokens(4)) for _ in range(count)]
    return requests + [(context, [target[0] % 5 + 7]) for context, target in requests[:2]]
