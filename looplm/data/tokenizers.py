"""Byte-level BPE tokenizers: train a small one, or load the one of a model.

The layout is that of Ouro and SmolLM2 (whose 49,152-entry vocabulary the paper uses): digits are split
one by one, then byte-level BPE without a prefix space; `<|endoftext|>` is 0, `<|im_start|>` 1, `<|im_end|>` 2. Only
the vocabulary is our own. Every byte is in it, so any text survives encoding and decoding unchanged.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from looplm.data.chat import CHAT_TEMPLATE, TURN_END, TURN_START

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


def train_bpe(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; the same documents give the same vocabulary.

    Args:
        documents: the text to learn merges from.
        vocab_size: entries wanted, special tokens and the 256 bytes included. A corpus too small to yield that many
            merges gives fewer: read `len(tokenizer)`.

    Returns:
        A tokenizer whose beginning, end and padding token are all `<|endoftext|>`; it adds none by itself. Its chat
        template is ChatML.

    Raises:
        ValueError: vocab_size is below 259 (256 bytes and 3 special tokens).
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size is {vocab_size}: give at least {MIN_VOCAB_SIZE} "
            f"(256 bytes and {len(SPECIAL_TOKENS)} special tokens)"
        )
    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def byte_level(model: models.BPE) -> Tokenizer:
    """A BPE between the layout's two ends: digits one by one, then bytes, without a prefix space; and back."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or a Hugging Face model name; code of the repository is never run.

    Raises:
        ValueError: there is no tokenizer of that name, or it cannot be reached or read.
    """
    try:
        return AutoTokenizer.from_pretrained(str(name_or_path), trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(": ")
        raise ValueError(
            f"no tokenizer at {name_or_path}: give a folder with tokenizer.json or a Hugging Face model name ({reason})"
        ) from error
