"""Text as it comes: whole characters, stop strings, end tokens; and the asyncio interface over a real thread."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import blocks_are_free
from tiny import tiny_model

from looplm.data.tokenizers import train_bpe
from looplm.engine import AsyncEngine, Completion, Engine, Piece, SamplingParams
from looplm.engine.text import TextStream

TOKENIZER = train_bpe(["the union of states shall have peace, and the union shall last. Wörter 🙂 日本語"] * 20, 300)
MODEL = tiny_model(vocab_size=len(TOKENIZER), eos_token_id=2)
PROMPT = "the union of"


@pytest.fixture
def engine() -> Engine:
    return Engine(MODEL, TOKENIZER, kv_bytes=1 << 20)


# --- TextStream ---


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="ab eßé🙂日本 the\n", max_size=30), prompt=st.sampled_from(["", "the ", "日"]))
def test_pieces_are_whole_characters_and_make_up_the_text(text: str, prompt: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(TOKENIZER, TOKENIZER(prompt, add_special_tokens=False)["input_ids"], ())
    for token in ids:
        before = stream.settled
        assert not stream.push(token)
        assert stream.settled.startswith(before) and "�" not in stream.settled
    stream.end()
    assert stream.settled == stream.text == text


def test_an_unfinished_character_is_shown_at_the_end() -> None:
    token = TOKENIZER("🙂", add_special_tokens=False)["input_ids"][0]
    if TOKENIZER.decode([token]) == "🙂":
        token = TOKENIZER.convert_tokens_to_ids("ð")
    stream = TextStream(TOKENIZER, [], ())
    stream.push(token)
    assert stream.text == ""
    stream.end()
    assert stream.text == "�"


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(alphabet="abc the", max_size=25),
    stop=st.lists(st.text(alphabet="abc t", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_end_the_text_before_them(text: str, stop: list[str]) -> None:
    stream, ended = TextStream(TOKENIZER, [], tuple(stop)), False
    settled = ""
    for token in TOKENIZER(text, add_special_tokens=False)["input_ids"]:
        ended = stream.push(token)
        assert stream.settled.startswith(settled), "what was given out is never taken back"
        settled = stream.settled
        if ended:
            break
    stream.end()
    places = [text.find(s) for s in stop if s in text]
    assert ended == bool(places)
    if not places:
        assert stream.text == text
    else:  # a token may complete two stop strings at once: the first place wins
        assert all(s not in stream.text for s in stop) and text.startswith(stream.text)
        assert any(text.startswith(stream.text + s) for s in stop)


# --- ends ---


def test_text_prompts_and_their_text(engine: Engine) -> None:
    found = engine.generate([PROMPT], SamplingParams(max_tokens=12, ignore_eos=True))[0]
    assert found.finish_reason == "length"
    assert found.prompt_token_ids == TOKENIZER(PROMPT, add_special_tokens=False)["input_ids"]
    assert found.text == TOKENIZER.decode(found.token_ids, skip_special_tokens=True)
    assert found.mean_depth == 3


def test_the_end_token_stops() -> None:
    free = Engine(MODEL, TOKENIZER, kv_bytes=1 << 20).generate([PROMPT], SamplingParams(max_tokens=8, ignore_eos=True))
    new = free[0].token_ids
    end = next(i for i in range(1, 8) if new[i] not in new[:i])
    model = tiny_model(vocab_size=len(TOKENIZER), eos_token_id=[new[end], 5])
    engine = Engine(model, TOKENIZER, kv_bytes=1 << 20)
    found = engine.generate([PROMPT] * 2, [SamplingParams(max_tokens=8, ignore_eos=b) for b in (False, True)])
    assert found[0].finish_reason == "stop" and found[0].token_ids == new[: end + 1]
    assert (
        len(found[0].exit_depths) == end + 1 and len(found[0].position_depths) == len(found[0].prompt_token_ids) + end
    )
    assert found[1].finish_reason == "length" and found[1].token_ids == new
    blocks_are_free(engine)


def test_a_stop_string_stops(engine: Engine) -> None:
    free = engine.generate([PROMPT], SamplingParams(max_tokens=12, ignore_eos=True))[0]
    stop = free.text[5:8]
    found = engine.generate([PROMPT], SamplingParams(max_tokens=12, ignore_eos=True, stop=["@@", stop]))[0]
    assert found.finish_reason == "stop" and found.text == free.text[: free.text.index(stop)]
    assert found.token_ids == free.token_ids[: len(found.token_ids)] and len(found.token_ids) < 12
    blocks_are_free(engine)


def test_prompts_must_be_a_list(engine: Engine) -> None:
    with pytest.raises(ValueError, match="prompts is one string; pass a list of prompts"):
        engine.generate(PROMPT)
    with pytest.raises(ValueError, match="params has 2 entries; there are 1 prompts"):
        engine.generate([PROMPT], [SamplingParams()] * 2)


# --- asyncio ---


def within(engine: Engine, work: Callable[[AsyncEngine], Coroutine[Any, Any, Any]]) -> Any:
    async def run() -> Any:
        async with AsyncEngine(engine) as serving:
            return await asyncio.wait_for(work(serving), 60)

    return asyncio.run(run())


def test_streams_give_what_generate_gives(engine: Engine) -> None:
    prompts = [PROMPT, "peace", "and the union shall last."]
    params = [
        SamplingParams(max_tokens=9, exit_threshold=0.6, ignore_eos=True, stop="zz", seed=i, n=1 + i % 2)
        for i in range(3)
    ]
    expected = Engine(MODEL, TOKENIZER, kv_bytes=1 << 20).generate(prompts, params)

    async def collect(serving: AsyncEngine, prompt: str, asked: SamplingParams) -> list[Piece]:
        return [piece async for piece in serving.stream(prompt, asked)]

    async def work(serving: AsyncEngine) -> list[list[Piece]]:
        return await asyncio.gather(*(collect(serving, *pair) for pair in zip(prompts, params, strict=True)))

    streams = within(engine, work)
    found: list[Completion] = []
    for pieces in streams:
        for index in sorted({piece.index for piece in pieces}):
            mine = [piece for piece in pieces if piece.index == index]
            assert [piece.completion is None for piece in mine] == [True] * (len(mine) - 1) + [False]
            completion = mine[-1].completion
            assert completion is not None
            assert [token for piece in mine for token in piece.token_ids] == completion.token_ids
            assert [depth for piece in mine for depth in piece.exit_depths] == completion.exit_depths
            assert "".join(piece.text for piece in mine) == completion.text
            assert len(mine) >= 9, "a piece a token"
            found.append(completion)
    key = [(c.index, c.prompt_token_ids, c.token_ids, c.exit_depths, c.text) for c in found]
    assert key == [(c.index, c.prompt_token_ids, c.token_ids, c.exit_depths, c.text) for c in expected]
    blocks_are_free(engine)


def test_generate_of_the_async_engine(engine: Engine) -> None:
    params = SamplingParams(max_tokens=4, n=3, temperature=1.0, seed=1, ignore_eos=True)
    found = within(engine, lambda serving: serving.generate(PROMPT, params))
    expected = engine.generate([PROMPT], params)
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]


def test_a_stream_left_early_cancels_its_request(engine: Engine) -> None:
    async def work(serving: AsyncEngine) -> Completion:
        long = serving.stream(PROMPT, SamplingParams(max_tokens=100, ignore_eos=True))
        async for _ in long:
            break
        await long.aclose()
        other = asyncio.create_task(serving.generate(PROMPT, SamplingParams(max_tokens=100, ignore_eos=True)))
        await asyncio.sleep(0.02)
        other.cancel()
        with pytest.raises(asyncio.CancelledError):
            await other
        return (await serving.generate(PROMPT, SamplingParams(max_tokens=2, ignore_eos=True)))[0]

    assert within(engine, work).finish_reason == "length"
    blocks_are_free(engine)


def test_refusals_reach_the_caller_and_closing_cancels(engine: Engine) -> None:
    async def work(serving: AsyncEngine) -> list[Piece]:
        with pytest.raises(ValueError, match="the prompt is empty"):
            await serving.generate("")
        pieces = serving.stream(PROMPT, SamplingParams(max_tokens=100, ignore_eos=True))
        seen = [await anext(pieces)]
        await asyncio.to_thread(serving.close)
        seen += [piece async for piece in pieces]
        with pytest.raises(RuntimeError, match="the engine is closed"):
            await serving.generate(PROMPT, SamplingParams(max_tokens=2))
        return seen

    last = within(engine, work)[-1].completion
    assert last is not None and last.finish_reason == "cancelled" and len(last.token_ids) < 100
    blocks_are_free(engine)


def test_an_engine_that_breaks_says_so(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list:
        raise torch.OutOfMemoryError("gone")

    async def work(serving: AsyncEngine) -> None:
        monkeypatch.setattr(engine, "step", broken)
        for message in ("the engine has stopped working", "the engine is closed"):
            with pytest.raises(RuntimeError, match=message) as caught:
                await serving.generate(PROMPT, SamplingParams(max_tokens=2))
            assert "gone" in str(caught.value.__cause__)

    within(engine, work)
