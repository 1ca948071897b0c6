"""Preparing and opening: exactly what encoding in memory gives, in any number of processes, whatever kills them."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from looplm.data import preparing
from looplm.data.encoding import encode_documents
from looplm.data.mixture import Mixture
from looplm.data.pipeline import Windows
from looplm.data.preparing import Preparation, prepare
from looplm.data.settings import SourceSettings
from looplm.data.shards import PreparedSource, ShardWriter, open_corpus
from looplm.data.splitting import hold_out
from looplm.data.tokenizers import train_bpe

ROOT = Path(__file__).parents[2]
WORDS = "the union of states shall people congress make law peace and war with hope for every citizen".split()
TEXTS = [" ".join(random.Random(i).choices(WORDS, k=40)) + "\n" for i in range(120)]
CHATS = [
    [{"role": "user", "content": f"{i} + 1?"}, {"role": "assistant", "content": f"That is {i + 1}."}] for i in range(60)
]
TOKENIZER = train_bpe(TEXTS, 300)


def write_lines(path: Path, records) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def sources(tmp_path) -> dict[str, SourceSettings]:
    texts = write_lines(tmp_path / "in" / "texts.jsonl", [{"text": text} for text in TEXTS])
    chats = write_lines(tmp_path / "in" / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    return {
        "texts": SourceSettings(location=texts),
        "chats": SourceSettings(location=chats, messages_field="messages"),
    }


def check(found: PreparedSource, documents, every: int = 8) -> None:
    """Against the split and the encoder, in memory."""
    split = list(hold_out(documents, every))
    for corpus, held_out in ((found.train, False), (found.validation, True)):
        expected = encode_documents(TOKENIZER, [document for document, side in split if side == held_out])
        assert np.array_equal(corpus.tokens, expected.tokens) and corpus.tokens.dtype == expected.tokens.dtype
        assert np.array_equal(corpus.offsets, expected.offsets) and corpus.offsets.dtype == np.int64
        assert corpus.characters == expected.characters
        assert (corpus.learnt is None) == (expected.learnt is None)
        assert expected.learnt is None or np.array_equal(corpus.learnt, expected.learnt)


def error_of(*arguments, **options) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        prepare(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestPrepare:
    def test_files_equal_encoding_in_memory(self, tmp_path, sources):
        found = prepare(sources, TOKENIZER, tmp_path / "data", 8)
        assert list(found) == ["texts", "chats"]
        check(found["texts"], TEXTS)
        check(found["chats"], CHATS)
        check(open_corpus(tmp_path / "data", "chats"), CHATS)

    @pytest.mark.parametrize("workers", [1, 2])
    def test_chunks_and_processes_change_nothing(self, tmp_path, sources, monkeypatch, workers):
        monkeypatch.setattr(preparing, "CHUNK_CHARACTERS", 900)
        seen: list[Preparation] = []
        found = prepare(sources, TOKENIZER, tmp_path / "data", 8, workers=workers, report=seen.append)
        check(found["texts"], TEXTS)
        check(found["chats"], CHATS)
        texts = [state for state in seen if state.source == "texts"]
        assert len(texts) > 10
        assert all(a.fraction < b.fraction and a.tokens < b.tokens for a, b in pairwise(texts))
        assert texts[-1].fraction == 1
        assert texts[-1].tokens == len(found["texts"].train.tokens) + len(found["texts"].validation.tokens)

    def test_a_second_time_nothing_is_encoded_or_read(self, tmp_path, sources, monkeypatch):
        prepare(sources, TOKENIZER, tmp_path / "data", 8)
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*.*")}
        monkeypatch.setattr(preparing, "encode_chunks", None)
        monkeypatch.setattr("hashlib.file_digest", None)
        check(prepare(sources, TOKENIZER, tmp_path / "data", 8)["texts"], TEXTS)
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*.*")} == before

    def test_the_arrays_are_mapped_not_read(self, tmp_path, sources):
        found = prepare(sources, TOKENIZER, tmp_path / "data", 8)["texts"].train
        assert isinstance(found.tokens.base, np.memmap) and not found.tokens.flags.writeable
        windows = Windows(found, 16)
        assert windows[3]["labels"].tolist() == found.tokens[49:65].tolist()

    def test_mixtures_of_prepared_sources(self, tmp_path, sources):
        found = prepare(sources, TOKENIZER, tmp_path / "data", 8)
        mixed = Mixture({name: source.train for name, source in found.items()}, {"texts": 1, "chats": 1}, 32, 0)
        learnt = {mixed.source_of(k): (mixed[k]["labels"] >= 0).mean() for k in range(2)}
        assert learnt["texts"] == 1 and 0 < learnt["chats"] < 0.7

    def test_a_hub_source(self, tmp_path, monkeypatch):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr(preparing, "CHUNK_CHARACTERS", 900)
        write_lines(tmp_path / "set" / "train.jsonl", [{"text": text} for text in TEXTS])
        source = {"web": SourceSettings(location=f"hub:{tmp_path / 'set'}", limit=50)}
        seen: list[Preparation] = []
        check(prepare(source, TOKENIZER, tmp_path / "data", 8, workers=1, report=seen.append)["web"], TEXTS[:50])
        assert 0 < seen[0].fraction < seen[-1].fraction == 1
        unlimited = {"web": SourceSettings(location=f"hub:{tmp_path / 'set'}")}
        message = error_of(unlimited, TOKENIZER, tmp_path / "data", 8)
        assert "limit was 50 and is None" in message


class TestFingerprint:
    """What no longer fits is refused, says why, and is left as it was; `anew` replaces it."""

    def changed(self, tmp_path, sources, tokenizer=TOKENIZER, every: int = 8) -> str:
        index = (tmp_path / "data" / "texts" / "index.json").read_bytes()
        message = error_of(sources, tokenizer, tmp_path / "data", every)
        assert message.startswith(
            f"source texts no longer matches what was prepared in {tmp_path / 'data' / 'texts'}: "
        )
        assert message.endswith("`looplm data prepare RECIPE --anew`, or choose another data.folder")
        assert (tmp_path / "data" / "texts" / "index.json").read_bytes() == index
        found = prepare(sources, tokenizer, tmp_path / "data", every, anew=True)
        assert set(found) == set(sources)
        prepare(sources, tokenizer, tmp_path / "data", every)
        return message.split(": ", 1)[1].split(". Prepare")[0]

    @pytest.fixture
    def texts(self, tmp_path):
        """A folder of two files, prepared."""
        write_lines(tmp_path / "in" / "a.jsonl", [{"text": text, "more": "x" + text} for text in TEXTS[:30]])
        write_lines(tmp_path / "in" / "b.jsonl", [{"text": text, "more": "x" + text} for text in TEXTS[30:60]])
        sources = {"texts": SourceSettings(location=str(tmp_path / "in"))}
        prepare(sources, TOKENIZER, tmp_path / "data", 8)
        return sources

    def test_the_tokenizer(self, tmp_path, texts):
        other = train_bpe(["another text"] * 3, 262)
        assert self.changed(tmp_path, texts, tokenizer=other) == "the tokenizer is another one"

    def test_the_split(self, tmp_path, texts):
        assert self.changed(tmp_path, texts, every=5) == "validation_every was 8 and is 5"

    def test_settings(self, tmp_path, texts):
        other = {"texts": SourceSettings(location=str(tmp_path / "in"), text_field="more")}
        assert self.changed(tmp_path, other) == "text_field was 'text' and is 'more'"
        found = prepare(other, TOKENIZER, tmp_path / "data", 8)["texts"]
        check(found, ["x" + text for text in TEXTS[:60]])

    def test_content(self, tmp_path, texts):
        write_lines(tmp_path / "in" / "b.jsonl", [{"text": text} for text in TEXTS[31:60]])
        assert self.changed(tmp_path, texts) == "b.jsonl changed"
        (tmp_path / "in" / "a.jsonl").rename(tmp_path / "in" / "c.jsonl")
        assert self.changed(tmp_path, texts) == "c.jsonl is new; a.jsonl is gone"
        for number in range(4):
            write_lines(tmp_path / "in" / f"d{number}.jsonl", [{"text": f"{number}"}])
        assert self.changed(tmp_path, texts).endswith("d2.jsonl is new; 1 more files differ")

    def test_a_touched_or_moved_file_with_the_same_content_fits(self, tmp_path, texts):
        os.utime(tmp_path / "in" / "a.jsonl", (1, 1))
        prepare(texts, TOKENIZER, tmp_path / "data", 8)
        record = json.loads((tmp_path / "data" / "texts" / "fingerprint.json").read_text())
        assert record["files"]["a.jsonl"]["modified_ns"] == 10**9
        shutil.copytree(tmp_path / "in", tmp_path / "elsewhere")
        moved = {"texts": SourceSettings(location=str(tmp_path / "elsewhere"))}
        prepare(moved, TOKENIZER, tmp_path / "data", 8)

    def test_damaged_files(self, tmp_path, texts):
        os.truncate(tmp_path / "data" / "texts" / "train.tokens", 10)
        with pytest.raises(ValueError, match=r"source texts is damaged: .*train.tokens has 10 bytes of \d+; run"):
            open_corpus(tmp_path / "data", "texts")
        assert "train.tokens has 10 bytes of" in self.changed(tmp_path, texts)
        (tmp_path / "data" / "texts" / "fingerprint.json").unlink()
        assert self.changed(tmp_path, texts) == "its fingerprint is gone"
        assert open_corpus(tmp_path / "data", "texts").train.documents > 40

    def test_another_version(self, tmp_path, texts):
        path = tmp_path / "data" / "texts" / "fingerprint.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": 0}))
        assert self.changed(tmp_path, texts) == "it was prepared by another version of looplm"

    def test_other_files_in_the_folder_are_left_alone(self, tmp_path, texts):
        (tmp_path / "data" / "texts" / "mine.txt").write_text("keep")
        other = {"texts": SourceSettings(location=str(tmp_path / "in"), limit=40)}
        assert self.changed(tmp_path, other) == "limit was None and is 40"
        assert (tmp_path / "data" / "texts" / "mine.txt").read_text() == "keep"

    def test_prepared_data_may_be_read_only(self, tmp_path, texts, monkeypatch):
        monkeypatch.setattr(preparing, "FileLock", None)
        monkeypatch.setattr(Path, "mkdir", None)
        prepare(texts, TOKENIZER, tmp_path / "data", 8)


class TestRefusedBeforeAnythingIsWritten:
    def refused(self, tmp_path, sources, **options) -> str:
        message = error_of(sources, options.pop("tokenizer", TOKENIZER), tmp_path / "data", 8, **options)
        assert not (tmp_path / "data").exists()
        return message

    def test_sources(self, tmp_path, sources):
        blank = write_lines(tmp_path / "blank.jsonl", [{"text": " "}])
        fields = write_lines(tmp_path / "fields.jsonl", [{"body": "x"}])
        for location, reason in (
            (str(tmp_path / "nope"), "source web: no such file or folder"),
            (blank, "source web: corpus is empty: no text"),
            (fields, f"source web: {fields}, line 1: no field 'text'; fields are body"),
        ):
            assert reason in self.refused(tmp_path, {**sources, "web": SourceSettings(location=location)})

    @pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b"])
    def test_names(self, tmp_path, sources, name):
        assert f"source name {name!r}" in self.refused(tmp_path, {name: sources["texts"]})

    def test_chat_data_without_markers(self, tmp_path, sources):
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"b": 0}, "b")), bos_token="b")
        assert "no token <|im_start|>" in self.refused(tmp_path, sources, tokenizer=plain)

    def test_arguments(self, tmp_path, sources):
        assert "workers is 0" in self.refused(tmp_path, sources, workers=0)
        assert "data.sources is empty" in self.refused(tmp_path, {})

    def test_opening_what_is_not_there(self, tmp_path):
        with pytest.raises(ValueError, match=r"source web is not prepared in .*: run `looplm data prepare RECIPE`"):
            open_corpus(tmp_path, "web")


SCRIPT = """
import sys
from tokenizers import Tokenizer
from looplm.data import preparing
from looplm.data.settings import SourceSettings

class Plain:
    # what preparing needs of a tokenizer of transformers, whose import takes seconds
    bos_token_id, is_fast, backend_tokenizer = 0, True, Tokenizer.from_file(sys.argv[2])
    def __len__(self):
        return self.backend_tokenizer.get_vocab_size()

if __name__ == "__main__":
    preparing.CHUNK_CHARACTERS = 2000
    source = {"texts": SourceSettings(location=sys.argv[1])}
    report = lambda state: print(state.tokens, flush=True)
    preparing.prepare(source, Plain(), sys.argv[3], 8, workers=2, report=report)
    print("done", flush=True)
    assert not {"torch", "transformers"} & set(sys.modules)
"""


class TestInterruptions:
    def start(self, tmp_path, location: str) -> subprocess.Popen:
        script = tmp_path / "prepare.py"
        script.write_text(SCRIPT)
        TOKENIZER.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
        command = [sys.executable, str(script), location, str(tmp_path / "tokenizer.json"), str(tmp_path / "data")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)

    def test_killed_it_goes_on_where_it_stopped(self, tmp_path):
        documents = [f"{i} " + " ".join(random.Random(i).choices(WORDS, k=400)) for i in range(90)]
        location = write_lines(tmp_path / "in.jsonl", [{"text": text} for text in documents])
        counts = []
        for wanted in (3, 20):  # progress lines before the kill; in a group of its own, so that workers can be seen
            process = self.start(tmp_path, location)
            assert process.stdout is not None
            counts.append([int(process.stdout.readline()) for _ in range(wanted)])
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            index = json.loads((tmp_path / "data" / "texts" / "index.json").read_text())
            assert not index["complete"]
            with pytest.raises(ValueError, match="not prepared"):
                open_corpus(tmp_path / "data", "texts")
            self.wait_for_the_workers(process.pid)
        assert counts[1][0] > counts[0][-1]  # the second run did not begin again
        process = self.start(tmp_path, location)
        last = process.communicate()[0].split()
        assert last[-1] == "done" and int(last[0]) > counts[1][-1]
        assert process.returncode == 0
        check(open_corpus(tmp_path / "data", "texts"), documents)

    def wait_for_the_workers(self, group: int) -> None:
        """They end by themselves; the group vanishes with its last process."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                os.killpg(group, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)
        raise AssertionError("workers outlived their parent")

    def test_two_processes_prepare_once(self, tmp_path):
        documents = [f"{i} " + " ".join(random.Random(i).choices(WORDS, k=400)) for i in range(20)]
        location = write_lines(tmp_path / "in.jsonl", [{"text": text} for text in documents])
        both = [self.start(tmp_path, location) for _ in range(2)]
        said = [process.communicate()[0].split() for process in both]
        assert [lines[-1] for lines in said] == ["done", "done"]
        assert sorted(len(lines) > 1 for lines in said) == [False, True]
        check(open_corpus(tmp_path / "data", "texts"), documents)

    def test_a_full_disk_loses_nothing(self, tmp_path, sources, monkeypatch):
        monkeypatch.setattr(preparing, "CHUNK_CHARACTERS", 900)
        write, calls = ShardWriter._write, []

        def full(writer, name, array):
            calls.append(name)
            if len(calls) > 30:
                writer._files[name].write(b"torn")
                raise OSError(errno.ENOSPC, "No space left on device")
            write(writer, name, array)

        monkeypatch.setattr(ShardWriter, "_write", full)
        with pytest.raises(OSError, match="No space left"):
            prepare(sources, TOKENIZER, tmp_path / "data", 8, workers=1)
        monkeypatch.setattr(ShardWriter, "_write", write)
        seen: list[Preparation] = []
        check(prepare(sources, TOKENIZER, tmp_path / "data", 8, workers=1, report=seen.append)["texts"], TEXTS)
        assert seen[0].fraction > 0.1

    def test_what_lies_beyond_the_index_is_cut_off(self, tmp_path, sources, monkeypatch):
        """A kill between writing and recording: the files are longer than the index says."""
        monkeypatch.setattr(preparing, "CHUNK_CHARACTERS", 900)

        class Stop(Exception): ...

        def stop(state: Preparation) -> None:
            if state.fraction > 0.4:
                raise Stop

        with pytest.raises(Stop):
            prepare(sources, TOKENIZER, tmp_path / "data", 8, workers=1, report=stop)
        for path in (tmp_path / "data" / "texts").glob("*.*"):
            if path.suffix != ".json":
                with path.open("ab") as file:
                    file.write(b"torn")
        check(prepare(sources, TOKENIZER, tmp_path / "data", 8, workers=1)["texts"], TEXTS)

    def test_an_unfinished_preparation_of_other_data_begins_again(self, tmp_path, sources, monkeypatch):
        monkeypatch.setattr(preparing, "CHUNK_CHARACTERS", 900)

        def stop(state: Preparation) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            prepare(sources, TOKENIZER, tmp_path / "data", 8, workers=1, report=stop)
        write_lines(tmp_path / "in" / "texts.jsonl", [{"text": text} for text in TEXTS[::-1]])
        check(prepare(sources, TOKENIZER, tmp_path / "data", 8, workers=1)["texts"], TEXTS[::-1])

    def test_a_bad_record_far_in_keeps_what_was_encoded(self, tmp_path, monkeypatch):
        monkeypatch.setattr(preparing, "CHUNK_CHARACTERS", 900)
        location = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS] + [{"txt": "x"}])
        message = error_of({"web": SourceSettings(location=location)}, TOKENIZER, tmp_path / "data", 8, workers=1)
        assert message == f"source web: {location}, line 121: no field 'text'; fields are txt"
        write_lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
        check(prepare({"web": SourceSettings(location=location)}, TOKENIZER, tmp_path / "data", 8)["web"], TEXTS)
