"""A recipe from text to a trained folder: data, tokenizer, model, trainer, report.

`train` is what both `looplm train RECIPE.yaml` and `looplm demo` run. Everything that can be wrong with the input is
checked before the output folder is made.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from looplm.data.corpora import load_corpus, split_documents
from looplm.data.pipeline import EncodedCorpus, TrainingBatches, Windows, encode_documents
from looplm.data.tokenizers import load_tokenizer, train_bpe
from looplm.files import save_folder, write_text
from looplm.model.configuration import OuroConfig
from looplm.model.modeling import OuroForCausalLM
from looplm.training.recipe import Recipe
from looplm.training.trainer import Trainer, TrainingResult


@dataclass(frozen=True)
class PreparedData:
    """The text of a run, encoded, with its tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    train: EncodedCorpus
    validation: EncodedCorpus

    def summary(self, sources: list[str]) -> dict[str, Any]:
        """The `data` section of a report."""
        return {
            "sources": sources,
            "train_tokens": len(self.train.tokens),
            "validation_tokens": len(self.validation.tokens),
            "train_documents": len(self.train.offsets) - 1,
            "validation_documents": len(self.validation.offsets) - 1,
            "validation_characters": self.validation.characters,
        }


def prepare_data(recipe: Recipe) -> PreparedData:
    """Read the sources, hold out documents, train or load the tokenizer, encode.

    Raises:
        ValueError: a missing source, an empty corpus, no such tokenizer.
    """
    documents = load_corpus(recipe.data.sources, recipe.data.text_field)
    train, validation = split_documents(documents, recipe.data.validation_every)
    if recipe.tokenizer.pretrained is not None:
        tokenizer = load_tokenizer(recipe.tokenizer.pretrained)
    else:
        assert recipe.tokenizer.train_bpe is not None
        tokenizer = train_bpe(train, recipe.tokenizer.train_bpe)
    return PreparedData(tokenizer, encode_documents(tokenizer, train), encode_documents(tokenizer, validation))


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> OuroForCausalLM:
    """A freshly initialised model of the recipe's shape over the tokenizer's vocabulary; seeded by the recipe."""
    fields = recipe.model.model_dump(exclude={"gate_bias", "post_norm_gain", "rope_theta"})
    config = OuroConfig(
        vocab_size=len(tokenizer),
        rope_parameters={"rope_type": "default", "rope_theta": recipe.model.rope_theta},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        exit_beta=recipe.training.exit_beta,
        exit_prior=recipe.training.exit_prior,
        **fields,
    )
    torch.manual_seed(recipe.seed)
    model = OuroForCausalLM(config)
    torch.nn.init.constant_(model.model.early_exit_gate.bias, recipe.model.gate_bias)
    for name, gain in model.named_parameters():
        if name.endswith("layernorm_2.weight"):
            torch.nn.init.constant_(gain, recipe.model.post_norm_gain)
    if recipe.training.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def train(recipe: Recipe) -> tuple[OuroForCausalLM, PreparedData, TrainingResult]:
    """Run a recipe; leaves `model/`, `metrics.jsonl` and `recipe.yaml` in its output folder.

    Raises:
        ValueError: anything wrong with the recipe's input, before anything is written.
        FloatingPointError: the loss stopped being finite.
    """
    data = prepare_data(recipe)
    settings, size = recipe.data, recipe.data.sequence_length
    if size > recipe.model.max_position_embeddings:
        limit = recipe.model.max_position_embeddings
        raise ValueError(f"data.sequence_length is {size}, beyond model.max_position_embeddings = {limit}")
    windows = Windows(data.train, size, separate_documents=settings.separate_documents)
    validation = Windows(data.validation, size, separate_documents=settings.separate_documents, keep_remainder=True)
    model = build_model(recipe, data.tokenizer)
    folder = Path(recipe.output)

    def save() -> None:
        def write(path: Path) -> None:
            model.save_pretrained(path)
            data.tokenizer.save_pretrained(path)
            write_text(path / "recipe.yaml", recipe.to_yaml())

        save_folder(folder / "model", write)

    batches = TrainingBatches(windows, recipe.training.batch_size, recipe.seed)
    trainer = Trainer(model, batches, validation, data.validation.characters, recipe.training, folder, save)
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    return model, data, trainer.run()


def build_report(
    title: str, command: str, recipe: Recipe, model: OuroForCausalLM, data: PreparedData, result: TrainingResult
) -> dict[str, Any]:
    """The report of a run (see `looplm.training.report`), without generations."""
    final, trained = result.final, model.config.total_ut_steps
    assert final.bits_per_character is not None
    loops = [
        {
            "loop": loop,
            "loss": loss,
            "bits_per_character": bits,
            "exit_probability": final.exit_probabilities[loop - 1] if loop <= trained else None,
        }
        for loop, (loss, bits) in enumerate(zip(final.losses, final.bits_per_character, strict=True), start=1)
    ]
    return {
        "title": title,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "recipe": recipe.model_dump(mode="json"),
        "model": {
            "parameters": sum(p.numel() for p in model.parameters()),
            "layers": model.config.num_hidden_layers,
            "loops": trained,
            "width": model.config.hidden_size,
            "vocabulary": model.config.vocab_size,
        },
        "data": data.summary(recipe.data.sources),
        "training": {
            "steps": result.steps,
            "tokens": result.tokens,
            "minutes": result.minutes,
            "compiled": result.compiled,
            "autocast": result.autocast,
        },
        "history": result.history,
        "evaluations": result.evaluations,
        "loops": loops,
        "expected_depth": final.expected_depth,
        "generations": [],
    }
