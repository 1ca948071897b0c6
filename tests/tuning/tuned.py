"""A small model with a tokenizer that speaks ChatML, conversations to tune it on, and recipes over both."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from small_run import small_model

from looplm.data.arithmetic import conversations
from looplm.data.tokenizers import train_bpe
from looplm.model.modeling import OuroForCausalLM
from looplm.model.saving import Provenance, write_model
from looplm.tuning.recipe import SFTRecipe
from looplm.tuning.rl_recipe import GRPORecipe


def chat_tokenizer(vocabulary: int = 300):
    """A BPE over the words of the sums."""
    texts = [message["content"] for messages in conversations(80) for message in messages]
    return train_bpe(texts, vocabulary)


def save_base(folder: Path, seed: int = 0, **fields: Any) -> Path:
    """The folder of an untrained model of 2 layers, width 32 and 3 loops over 300 tokens, context 256."""
    torch.manual_seed(seed)
    tokenizer = chat_tokenizer()
    model = small_model(
        **{"vocab_size": len(tokenizer), "max_position_embeddings": 256, "tie_word_embeddings": True, **fields}
    )
    with torch.no_grad():
        model.model.early_exit_gate.weight.normal_(generator=torch.Generator().manual_seed(seed))
    write_model(folder, model, tokenizer, Provenance("Untrained."))
    return folder


def write_conversations(path: Path, count: int = 60) -> Path:
    """JSON Lines of sums."""
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations(count)))
    return path


def sft_values(folder: Path, base: Path, **changes: Any) -> dict[str, Any]:
    """A recipe's values: 6 steps of 4 rows of 256 tokens."""
    chats = folder / "chats.jsonl"
    if not chats.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_conversations(chats)
    values: dict[str, Any] = {
        "model": str(base),
        "output": str(folder / "out"),
        "seed": 5,
        "data": {"sources": {"sums": {"location": str(chats), "messages_field": "messages"}}, "validation_every": 5},
        "steps": 6,
        "sequence_length": 256,
        "batch_rows": 4,
        "micro_batch_size": 2,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "autocast": "none",
        "evaluation_rows": 8,
        "checkpoints": {"every_steps": 2},
    }
    return copy.deepcopy({**values, **changes})


def sft_recipe(folder: Path, base: Path, **changes: Any) -> SFTRecipe:
    """The checked recipe of `sft_values`."""
    return SFTRecipe.validated(sft_values(folder, base, **changes), "small")


def weights(model: OuroForCausalLM) -> dict[str, torch.Tensor]:
    """All parameters by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def grpo_values(folder: Path, base: Path, **changes: Any) -> dict[str, Any]:
    """A recipe's values: 3 rollouts of 4 prompts x 4 samples, rewarded for letters, which is learnt at once."""
    folder.mkdir(parents=True, exist_ok=True)
    reward = folder / "letters.py"
    reward.write_text(
        "def letters(prompt, completion, answer, entry):\n"
        "    return sum(c.isalpha() for c in completion) / max(len(completion), 1)\n"
    )
    values: dict[str, Any] = {
        "model": str(base),
        "output": str(folder / "out"),
        "seed": 3,
        "environment": {
            "source": {
                "location": "running-sums",
                "prompt_field": "messages",
                "answer_field": "answer",
                "limit": 120,
            },
            "held_out_every": 4,
        },
        "rewards": [{"python": f"{reward}:letters"}],
        "steps": 3,
        "prompts": 4,
        "samples": 4,
        "micro_batch_size": 8,
        "max_new_tokens": 6,
        "learning_rate": 1e-2,
        "held_out": {"problems": 8},
        "checkpoints": {"every_steps": 1},
    }
    return copy.deepcopy({**values, **changes})


def grpo_recipe(folder: Path, base: Path, **changes: Any) -> GRPORecipe:
    """The checked recipe of `grpo_values`."""
    return GRPORecipe.validated(grpo_values(folder, base, **changes), "small")
