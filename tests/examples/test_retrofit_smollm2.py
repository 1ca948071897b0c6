"""The example end to end on a tiny dense model in SmolLM2's place: what it reports is what the model does."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_gguf import small_llama
from small_run import write_corpus

import looplm
from looplm.data.corpora import load_documents
from looplm.data.tokenizers import train_bpe
from looplm.model.loading import load_model
from looplm.model.retrofitting import retrofit

FILE = Path(looplm.__file__).parent.parent / "examples" / "retrofit_smollm2.py"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with a dense model of four layers, short windows and a corpus of twelve documents."""
    spec = importlib.util.spec_from_file_location("retrofit_smollm2", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "retrofit_smollm2", module)
    spec.loader.exec_module(module)
    tokenizer = train_bpe(load_documents(str(write_corpus(tmp_path / "corpus"))), 300)
    dense = small_llama(vocab_size=len(tokenizer), max_position_embeddings=128)
    monkeypatch.setattr(module, "load_dense", lambda source: (dense, tokenizer))
    monkeypatch.setattr(module, "LENGTH", 32)
    monkeypatch.setattr(module, "PYTHON_DOCS", str(tmp_path / "not-installed"))
    module.dense = dense
    return module


def options(example: Any, folder: Path, **changes: Any) -> Any:
    text = [str(folder / "corpus"), example.PYTHON_DOCS]
    return example.Options(
        **{"steps": 6, "output": str(folder / "out"), "text": text, "core": 2, "learning_rate": 1e-3, **changes}
    )


@pytest.mark.parametrize("changes", [{}, {"grow": True, "distillation": 1.0, "damping": 0.5}], ids=["plain", "all"])
def test_the_report_is_what_the_model_does(example, tmp_path, capsys, changes) -> None:
    example.main(options(example, tmp_path, **changes))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    before, after = report["losses"]["before"], report["losses"]["after"]
    assert len(before) == len(after) == 4 and report["tokens"] == 6 * 4 * 32
    assert after[2] < before[2]  # six steps are enough to see on a model whose weights are random
    first, end = report["core"]
    assert end - first == 2 and report["options"]["text"] == [str(tmp_path / "corpus")]
    shown = capsys.readouterr().out
    assert "is not there (apt install python3.11-doc)" in shown and f"{before[0]:.4f}" in shown
    looped, _ = load_model(str(tmp_path / "out" / "model"))
    assert looped.config.total_ut_steps == 3
    _, validation = example.read([str(tmp_path / "corpus")], load_model(str(tmp_path / "out" / "model"))[1])
    assert example.evaluate(looped, validation) == pytest.approx(after, abs=1e-3)
    texts = report["samples"]["dense model"]
    assert all(text.startswith(prompt) for text, prompt in zip(texts, example.PROMPTS, strict=True))


@torch.no_grad()
def test_damping_scales_what_a_loop_adds(example) -> None:
    ids, states = torch.randint(3, 250, (1, 20), generator=torch.Generator().manual_seed(0)), []
    for factor in (1.0, 1e-3, 5e-4, 0.0):
        looped = retrofit(example.dense, range(1, 3), 2)
        example.damp(looped, factor)
        states.append(looped(ids, output_hidden_states=True).hidden_states)
    steps = [last - start for start, _, last in states]
    assert steps[3].abs().max() == 0 and steps[0].norm() > 100 * steps[1].norm()
    torch.testing.assert_close(steps[1], 2 * steps[2], rtol=0, atol=0.02 * float(steps[1].abs().max()))


@torch.no_grad()
def test_distillation_adds_the_divergence_from_the_dense_model(example) -> None:
    dense, ids = example.dense, torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(0))
    places = torch.arange(20)[None].expand(2, -1)
    looped = retrofit(dense, range(1, 3), 2).train()

    def losses() -> list[float]:
        arguments = {"position_ids": places, "shift_labels": ids}
        return [float(looped(ids, num_loop_steps=loops, **arguments).loss) for loops in (1, 2)]

    plain, logits = losses(), looped(ids).logits
    target = dense(ids).logits.softmax(-1)
    divergence = float((target * (target.log() - logits.log_softmax(-1))).sum(-1).mean())
    example.distill(looped, dense, 0.5)
    assert losses() == pytest.approx([plain[0], plain[1] + 0.5 * divergence], rel=1e-4)
    assert divergence > 0.01
    looped.eval()  # and nothing outside training
    assert losses() == pytest.approx(plain, rel=1e-5)
