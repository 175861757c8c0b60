"""The sampling of replies: the paper's settings, and streams that depend on neither batch nor checkpoint."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from searches import PROMPTS
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from expo import errors
from expo.demo import ALIGNED
from expo.search.sampling import DrawProcessor, PenaltyProcessor, Sampler, repetition_share, stream_number
from expo.search.settings import Sampling


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    """Return the demo's aligned model and its tokenizer; in fp32, where rounding hardly ever changes a draw."""
    model: Any = AutoModelForCausalLM.from_pretrained(ALIGNED, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(ALIGNED)


def test_penalties_are_those_of_a_plain_loop() -> None:
    random = np.random.default_rng(0)
    tokens = torch.tensor(random.integers(0, 6, size=(4, 20)))
    scores = torch.tensor(random.normal(size=(4, 6)), dtype=torch.float32)
    for start in (0, 7, 20):
        penalised = PenaltyProcessor(start, 0.25, 0.125)(tokens, scores)
        for row in range(4):
            for token in range(6):
                count = sum(int(each) == token for each in tokens[row, start:])
                expected = scores[row, token] - 0.25 * (count > 0) - 0.125 * count
                assert penalised[row, token] == pytest.approx(float(expected), abs=1e-6)


def test_draws_are_those_of_temperature_top_k_and_top_p_in_the_right_shares() -> None:
    sampling = Sampling(temperature=0.7, top_p=0.9, top_k=8)
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(3)) * 1.5
    count = 20_000
    streams = torch.tensor([stream_number(0, index) for index in range(count)])
    drawn = DrawProcessor(3, streams, sampling)(torch.zeros(count, 5, dtype=torch.long), logits.expand(count, -1))
    assert ((drawn > -math.inf).sum(1) == 1).all()
    shares = torch.bincount(drawn.argmax(1), minlength=40) / count
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(8), TopPLogitsWarper(0.9)])
    nothing: Any = torch.zeros(1, 1, dtype=torch.long)
    expected = warpers(nothing, logits).softmax(1)[0]
    assert 2 < (expected > 0).sum() < 8
    assert ((shares > 0) == (expected > 0)).all()
    torch.testing.assert_close(shares, expected, atol=0.015, rtol=0)


def test_streams_differ_by_seed_prompt_and_step_and_by_nothing_else() -> None:
    logits = torch.zeros(2, 1000)

    def draw(seed: int, first: int, step: int) -> list[int]:
        streams = torch.tensor([stream_number(seed, first), stream_number(seed, first + 1)])
        sampling = Sampling(top_k=1000, top_p=1.0)
        left = DrawProcessor(4, streams, sampling)(torch.zeros(2, 4 + step, dtype=torch.long), logits)
        return [int(token) for token in left.argmax(1)]

    assert draw(0, 5, 9) == draw(0, 5, 9)
    assert draw(0, 5, 9)[1] == draw(0, 6, 9)[0]
    drawn = {token for seed in (0, 1) for first in (0, 2, 4) for step in (0, 1, 2) for token in draw(seed, first, step)}
    assert len(drawn) > 30  # of 36


def test_repetition_is_the_share_of_4_grams_seen_before() -> None:
    assert repetition_share([1, 2, 3]) == 0
    assert repetition_share([1, 2, 3, 4, 5]) == 0
    assert repetition_share([7] * 13) == pytest.approx(0.9)
    assert repetition_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(0.2)


def test_a_reply_does_not_depend_on_its_batch(demo: tuple[Any, Any]) -> None:
    sampling = Sampling(max_new_tokens=24)
    by_size = {}
    for size in (1, 5, 12):
        sampler = Sampler(*demo, PROMPTS, sampling, 3, size)
        assert sorted(index for batch in sampler.batches for index in batch) == list(range(len(PROMPTS)))
        by_size[size] = {index: reply for b in sampler.batches for index, reply in zip(b, sampler(b), strict=True)}
    assert by_size[1] == by_size[5] == by_size[12]
    assert len({reply.text for reply in by_size[1].values()}) == len(PROMPTS)
    assert {reply.finished for reply in by_size[1].values()} == {True, False}
    for reply in by_size[1].values():
        assert len(reply.tokens) == 24 or reply.finished
    assert Sampler(*demo, PROMPTS, sampling, 4, 12)([0])[0] != by_size[1][0]


def test_the_sampling_settings_of_a_checkpoint_take_no_part(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    before = Sampler(model, tokenizer, PROMPTS, Sampling(max_new_tokens=8))([0, 1])
    model.generation_config.update(repetition_penalty=3.0, no_repeat_ngram_size=1, min_new_tokens=8, num_beams=2)
    assert Sampler(model, tokenizer, PROMPTS, Sampling(max_new_tokens=8))([0, 1]) == before


def test_prompts_go_through_the_chat_template(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    sampler = Sampler(model, tokenizer, ["Return the"], Sampling(max_new_tokens=8))
    assert "no chat template" in sampler.notes[0]
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} name{% endif %}"
    )
    try:
        with_template = Sampler(model, tokenizer, ["Return the"], Sampling(max_new_tokens=8))
        tokenizer.chat_template = "{{ raise_exception('no turns today') }}"
        with pytest.raises(errors.UsageError, match="no turns today"):
            Sampler(model, tokenizer, ["Return the"], Sampling(max_new_tokens=8))
    finally:
        tokenizer.chat_template = None
    plain = Sampler(model, tokenizer, ["Return the name"], Sampling(max_new_tokens=8))
    assert with_template.notes == []
    assert with_template([0]) == plain([0])


def test_the_context_limits_a_reply_by_its_own_prompt(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    long = " the" * 249  # with the beginning of the text these are 250 of 256 tokens
    sampler = Sampler(model, tokenizer, ["If the", long, "A list"], Sampling(max_new_tokens=40))
    assert sampler.batches == [[0, 2], [1]]
    assert "leaves 6 to 6 new tokens for the replies to 1 of 3 prompts" in sampler.notes[1]
    assert len(sampler([1])[0].tokens) <= 6
    with pytest.raises(errors.UsageError, match="prompt 0 is 301 tokens long, of a context of 256"):
        Sampler(model, tokenizer, [" the" * 300], Sampling())
