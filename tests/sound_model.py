"""A sound checkpoint without training: a bigram model whose loops sharpen it, best after the third and worse beyond.

The state is (sqrt D) (cos a on the token's own axis, sin a on one axis more). The MLP takes a fixed step down that last
axis and the norm after the loop turns the rest into token: a falls from loop to loop, through 0 and beyond. The head is
log p(next | token) of what was learnt, as sharp after loop 3 as suits the text that is measured: before that it is too
flat, later too sure.
"""

import math
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from looplm.data.tokenizers import train_bpe
from looplm.model.configuration import OuroConfig
from looplm.model.modeling import OuroForCausalLM

LEARNT = "The loop goes round, and what it knows it knows a little better every time it has gone round once more. " * 3
TEXT = "The loop has gone round, and it knows a little more, and what it knows it knows better every time. " * 3
LOOPS, START, STEP, SHARPNESS = 3, math.radians(80), 0.2, 1.35


def sound_model(loops: int = LOOPS) -> tuple[OuroForCausalLM, PreTrainedTokenizerBase]:
    """The model and its tokenizer; the same at every call."""
    tokenizer = train_bpe([LEARNT], 280)
    vocabulary = len(tokenizer)
    config = OuroConfig(
        vocab_size=vocabulary,
        hidden_size=vocabulary + 1,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=2,
        total_ut_steps=loops,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = OuroForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        width, layer = math.sqrt(vocabulary + 1), model.model.layers[0]
        model.model.embed_tokens.weight[:, :-1] = width * math.cos(START) * torch.eye(vocabulary)
        model.model.embed_tokens.weight[:, -1] = width * math.sin(START)
        layer.input_layernorm_2.weight.zero_()  # attention adds nothing
        layer.mlp.gate_proj.weight[0, -1] = layer.mlp.up_proj.weight[0, -1] = 1.0
        layer.mlp.down_proj.weight[-1, 0] = -1.0
        layer.post_attention_layernorm_2.weight.fill_(STEP)
        model.lm_head.weight[:, :-1] = SHARPNESS * _log_bigrams(tokenizer) / (width * _token_share())
    return model.eval(), tokenizer


def _log_bigrams(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """(V, V) log p(next | token), with a hundredth of a count for what was not seen."""
    ids = torch.tensor(tokenizer(LEARNT)["input_ids"])
    counts = torch.full((len(tokenizer), len(tokenizer)), 1e-2)
    counts.index_put_((ids[1:], ids[:-1]), torch.ones(len(ids) - 1), accumulate=True)
    return (counts / counts.sum(0)).log()


def _token_share() -> float:
    """cos a after `LOOPS` loops."""
    token, rest = math.cos(START), math.sin(START)
    for _ in range(LOOPS):
        rest -= STEP
        length = math.hypot(token, rest)
        token, rest = token / length, rest / length
    return token


def save(model: OuroForCausalLM, tokenizer: PreTrainedTokenizerBase, path: Path) -> str:
    """Save both; the folder as a string, for commands."""
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
