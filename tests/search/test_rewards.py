"""Rewards: functions of the user, and reward models."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from expo import errors
from expo.demo import ALIGNED
from expo.search.models import choose_device, load_model_and_tokenizer
from expo.search.rewards import RewardModel, compute_rewards, load_reward


def test_a_reward_must_be_as_many_finite_numbers_as_replies() -> None:
    wrong: dict[Callable[..., Any], str] = {
        lambda prompts, replies: [1.0]: "returned 1 numbers for 2 replies",
        lambda prompts, replies: [1.0, math.nan]: "nan for the reply 'b'",
        lambda prompts, replies: 3: "list of numbers, got 3",
        lambda prompts, replies: {"y": 1}["x"]: "KeyError.*test_rewards.py, line",
    }
    for reward, message in wrong.items():
        with pytest.raises(errors.UsageError, match=message):
            compute_rewards(reward, "r", ["p", "q"], ["a", "b"])
    array: Any = np.array([1, 2])
    assert compute_rewards(lambda prompts, replies: array, "r", ["p", "q"], ["a", "b"]) == [1.0, 2.0]


def test_a_reward_by_name_is_looked_for_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_reward.py").write_text(
        "def length(prompts, replies): return [len(r) for r in replies]\nn = 1\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_reward("my_own_reward:length")(["p"], ["four"]) == [4]
    for name, message in {
        "my_own_reward:n": "not a function",
        "my_own_reward:x": "no attribute",
        "nowhere:f": "No mod",
    }.items():
        with pytest.raises(errors.UsageError, match=message):
            load_reward(name)
    assert str(tmp_path) not in sys.path


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a reward model with random weights."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    make: Any = LlamaConfig
    config = make(
        vocab_size=1536, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, num_labels=1, pad_token_id=2, eos_token_id=1, bos_token_id=0,
    )  # fmt: skip
    classifier: Any = LlamaForSequenceClassification
    classifier(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(ALIGNED)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


def test_a_reward_model_scores_the_chat(classifier_folder: Path) -> None:
    reward = RewardModel(str(classifier_folder), "cpu")
    prompts, replies = ["Return the", "If", "A list of"], ["value.", "it is not, then what is there to do", "x"]
    scores = reward(prompts, replies)
    model, tokenizer = load_model_and_tokenizer(
        AutoModelForSequenceClassification, str(classifier_folder), choose_device("cpu"), False
    )
    for prompt, reply, value in zip(prompts, replies, scores, strict=True):
        text = f"<s>user: {prompt}</s>assistant: {reply}</s>"
        tokens = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            assert value == pytest.approx(model(input_ids=tokens).logits.item(), abs=1e-5)
    assert len(set(scores)) == 3
    assert math.isfinite(reward(["Return the"], ["the end of it all " * 50])[0])
    reward._max_length = int(1e30)  # a tokenizer that knows no limit names such a number
    assert reward(prompts, replies) == scores


def test_a_model_that_is_no_reward_model_is_refused(classifier_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.CheckpointError, match=r"lacks score\.weight, which would be random"):
        RewardModel(str(ALIGNED), "cpu")
    with pytest.raises(errors.CheckpointError, match="transformers cannot load it as AutoModelForSeq"):
        RewardModel(str(tmp_path), "cpu")
