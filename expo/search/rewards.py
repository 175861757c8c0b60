"""What a reply is worth: a reward model of Hugging Face's, or a function of one's own."""

from __future__ import annotations

import importlib
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import CheckpointError, UsageError

BATCH = 8  # replies that a reward model scores at a time
ENDLESS = 1 << 30  # tokens: a tokenizer that knows no limit says a larger number

Reward = Callable[[list[str], list[str]], Sequence[float]]


def name_of(reward: Reward | str) -> str:
    """What tells it from another reward in a search that goes on."""
    if isinstance(reward, str):
        return os.path.abspath(reward) if os.path.exists(reward) else reward
    return f"{getattr(reward, '__module__', '')}:{getattr(reward, '__qualname__', type(reward).__qualname__)}"


def load_reward(reward: Reward | str, device: str = "auto", trust_remote_code: bool = False) -> Reward:
    """A function of prompts and replies, from one, from "module:function", or from a reward model's folder or hub id.

    A module is looked for in the current folder too. Raises UsageError and CheckpointError.
    """
    if not isinstance(reward, str):
        if not callable(reward):
            raise UsageError(f"reward must be a function, module:function or a model, got {reward!r}")
        return reward
    if not os.path.exists(reward) and ":" in reward:
        return _function(reward)
    return RewardModel(reward, device, trust_remote_code)


def rewards_of(reward: Reward, name: str, prompts: Sequence[str], replies: Sequence[str]) -> list[float]:
    """One finite number for each reply. Raises UsageError where a function of the user's gives anything else."""
    try:
        given = reward(list(prompts), list(replies))
    except Exception as error:
        if isinstance(reward, RewardModel):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise UsageError(
            f"reward {name}: {type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"
        ) from error
    try:
        values = [float(value) for value in given]
    except (TypeError, ValueError) as error:
        raise UsageError(f"reward {name} must return a list of numbers, got {given!r:.80}") from error
    if len(values) != len(replies):
        raise UsageError(f"reward {name} returned {len(values)} numbers for {len(replies)} replies")
    for value, reply in zip(values, replies, strict=True):
        if not math.isfinite(value):
            raise UsageError(f"reward {name} is {value} for the reply {reply!r:.80}; it must be finite")
    return values


def _function(text: str) -> Reward:
    module, _, name = text.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # importing runs what is there
        raise UsageError(f"reward {text}: {type(error).__name__}: {error}; looked in {here} too") from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise UsageError(f"reward {text} is a {type(found).__name__}, not a function of prompts and replies")
    reward: Reward = found
    return reward


class RewardModel:
    """A sequence classifier with one output, over the chat template of its own tokenizer."""

    def __init__(self, path: str, device: str = "auto", trust_remote_code: bool = False) -> None:
        from transformers import AutoModelForSequenceClassification

        from .models import device_of, load

        self._model, self._tokenizer = load(
            AutoModelForSequenceClassification, path, device_of(device), trust_remote_code
        )
        self._path = path
        labels = self._model.config.num_labels
        if labels != 1:
            raise CheckpointError(
                f"{path}: a classifier with {labels} outputs, and a reward is one number; "
                "choose one in a function of your own: --reward module:function"
            )
        config = self._model.config.get_text_config()
        if self._tokenizer.pad_token_id is None and config.pad_token_id is not None:
            self._tokenizer.pad_token = self._tokenizer.convert_ids_to_tokens(config.pad_token_id)
        # Some read the score off the last token that is no padding. Its own end token in that part would be skipped,
        # so where no token is meant for padding nothing is padded.
        config.pad_token_id = self._model.config.pad_token_id = self._tokenizer.pad_token_id
        self._batch_size = 1 if self._tokenizer.pad_token_id is None else BATCH
        self._tokenizer.truncation_side = "left"
        context = getattr(config, "max_position_embeddings", None)
        self._most = min(self._tokenizer.model_max_length, context or self._tokenizer.model_max_length)

    def __call__(self, prompts: list[str], replies: list[str]) -> list[float]:
        """What does not fit into the context is cut at the left."""
        import torch

        from .models import memory_explained

        scores: list[float] = []
        for start in range(0, len(prompts), self._batch_size):
            part = slice(start, start + self._batch_size)
            batch = self._encoded(prompts[part], replies[part]).to(self._model.device)
            with torch.no_grad(), memory_explained("reward model, or --keep host"):
                scores += self._model(**batch).logits[:, 0].float().tolist()
        return scores

    def _encoded(self, prompts: list[str], replies: list[str]) -> Any:
        how: dict[str, Any] = {"padding": self._batch_size > 1, "return_tensors": "pt"}
        if self._most < ENDLESS:
            how |= {"truncation": True, "max_length": self._most}
        if getattr(self._tokenizer, "chat_template", None) is None:
            return self._tokenizer(prompts, replies, **how)
        chats = [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
            for prompt, reply in zip(prompts, replies, strict=True)
        ]
        try:
            texts = self._tokenizer.apply_chat_template(chats, tokenize=False)
        except Exception as error:  # a template is a program
            raise CheckpointError(f"{self._path}: its chat template fails: {error}") from error
        return self._tokenizer(texts, add_special_tokens=False, **how)
