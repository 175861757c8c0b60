"""Score replies with a reward model of the Hugging Face Hub, or with a function of the user."""

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
NO_LIMIT = 1 << 30  # tokens; model_max_length is larger than this if a tokenizer has no limit

Reward = Callable[[list[str], list[str]], Sequence[float]]  # (prompts, replies) to a number for each reply


def reward_name(reward: Reward | str) -> str:
    """Return a name by which a search that continues recognises its reward."""
    if isinstance(reward, str):
        return os.path.abspath(reward) if os.path.exists(reward) else reward
    return f"{getattr(reward, '__module__', '')}:{getattr(reward, '__qualname__', type(reward).__qualname__)}"


def load_reward(reward: Reward | str, device: str = "auto", trust_remote_code: bool = False) -> Reward:
    """Return a function that takes lists of prompts and replies, and returns a number for each reply.

    Args:
        reward: Such a function, "module:function", or the folder or hub id of a reward model. A module may also lie in
            the current folder.
        device: The device of a reward model.
        trust_remote_code: True if code that comes with a reward model may run.

    Raises:
        UsageError: The function cannot be imported, or is not a function.
        CheckpointError: The reward model cannot be loaded.
    """
    if not isinstance(reward, str):
        if not callable(reward):
            raise UsageError(f"reward must be a function, module:function or a model, got {reward!r}")
        return reward
    if not os.path.exists(reward) and ":" in reward:
        return _import_function(reward)
    return RewardModel(reward, device, trust_remote_code)


def compute_rewards(reward: Reward, name: str, prompts: Sequence[str], replies: Sequence[str]) -> list[float]:
    """Return a finite reward for each reply.

    Raises:
        UsageError: The user's function raises an error, or returns anything but one finite number for each reply.
    """
    try:
        returned = reward(list(prompts), list(replies))
    except Exception as error:
        if isinstance(reward, RewardModel):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise UsageError(
            f"reward {name}: {type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"
        ) from error
    try:
        values = [float(value) for value in returned]
    except (TypeError, ValueError) as error:
        raise UsageError(f"reward {name} must return a list of numbers, got {returned!r:.80}") from error
    if len(values) != len(replies):
        raise UsageError(f"reward {name} returned {len(values)} numbers for {len(replies)} replies")
    for value, reply in zip(values, replies, strict=True):
        if not math.isfinite(value):
            raise UsageError(f"reward {name} is {value} for the reply {reply!r:.80}; it must be finite")
    return values


def _import_function(name: str) -> Reward:
    """Return the function that `module:function` names."""
    module, _, attributes = name.partition(":")
    current_folder = os.getcwd()
    sys.path.insert(0, current_folder)
    try:
        function: Any = importlib.import_module(module)
        for attribute in attributes.split("."):
            function = getattr(function, attribute)
    except Exception as error:  # an import runs the user's code, which may raise any error
        raise UsageError(
            f"reward {name}: {type(error).__name__}: {error}; {current_folder} was searched too"
        ) from error
    finally:
        sys.path.remove(current_folder)
    if not callable(function):
        raise UsageError(f"reward {name} is a {type(function).__name__}, not a function of prompts and replies")
    reward: Reward = function
    return reward


class RewardModel:
    """A reward that is a sequence classifier with one output, over the chat template of its own tokenizer."""

    def __init__(self, path: str, device: str = "auto", trust_remote_code: bool = False) -> None:
        """Load the model. Raises CheckpointError, and UsageError or EngineError for the device."""
        from transformers import AutoModelForSequenceClassification

        from .models import choose_device, load_model_and_tokenizer

        self._model, self._tokenizer = load_model_and_tokenizer(
            AutoModelForSequenceClassification, path, choose_device(device), trust_remote_code
        )
        self._path = path
        labels = self._model.config.num_labels
        if labels != 1:
            raise CheckpointError(
                f"{path}: this classifier has {labels} outputs, and a reward is one number; choose one of them in a "
                "function of your own: `reward='module:function'`"
            )
        config = self._model.config.get_text_config()
        if self._tokenizer.pad_token_id is None and config.pad_token_id is not None:
            self._tokenizer.pad_token = self._tokenizer.convert_ids_to_tokens(config.pad_token_id)
        # Some classifiers read the score at the last token that is no padding. If an end token served as padding, they
        # would skip a reply's own end token, so without a token for padding every reply is a batch of its own.
        config.pad_token_id = self._model.config.pad_token_id = self._tokenizer.pad_token_id
        self._batch_size = 1 if self._tokenizer.pad_token_id is None else BATCH
        self._tokenizer.truncation_side = "left"
        context = getattr(config, "max_position_embeddings", None)
        self._max_length = min(self._tokenizer.model_max_length, context or self._tokenizer.model_max_length)

    def __call__(self, prompts: list[str], replies: list[str]) -> list[float]:
        """Return the score of each reply. A chat that is longer than the model's context loses its beginning."""
        import torch

        from .models import explain_gpu_memory_errors

        scores: list[float] = []
        for start in range(0, len(prompts), self._batch_size):
            part = slice(start, start + self._batch_size)
            batch = self._encode(prompts[part], replies[part]).to(self._model.device)
            with torch.no_grad(), explain_gpu_memory_errors("reward model, or `keep='host'`"):
                scores += self._model(**batch).logits[:, 0].float().tolist()
        return scores

    def _encode(self, prompts: list[str], replies: list[str]) -> Any:
        """Return the tokens of a batch of chats, as the classifier takes them."""
        options: dict[str, Any] = {"padding": self._batch_size > 1, "return_tensors": "pt"}
        if self._max_length < NO_LIMIT:
            options |= {"truncation": True, "max_length": self._max_length}
        if getattr(self._tokenizer, "chat_template", None) is None:
            return self._tokenizer(prompts, replies, **options)
        chats = [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
            for prompt, reply in zip(prompts, replies, strict=True)
        ]
        try:
            texts = self._tokenizer.apply_chat_template(chats, tokenize=False)
        except Exception as error:  # a template is a program, which may raise any error
            raise CheckpointError(f"{self._path}: its chat template fails: {error}") from error
        return self._tokenizer(texts, add_special_tokens=False, **options)
