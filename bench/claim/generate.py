"""Sampled replies. The chances of a draw are a function of the seed and its place, so that models can be compared."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache


class Drawing(NamedTuple):
    """How tokens are drawn, after temperature, top-k and top-p, in this order."""

    temperature: float
    top_p: float
    top_k: int
    new_tokens: int


def precision(bf16: bool) -> Any:
    """Matrix products in bf16, of weights that stay fp32; or in fp32."""
    return torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()


@torch.no_grad()
def replies(model: Any, prompts: Sequence[list[int]], drawing: Drawing, seed: int, bf16: bool) -> list[list[int]]:
    """One reply in tokens to each encoded prompt, all in one batch; one that has ended ends with the end token."""
    pad, end = model.config.pad_token_id, model.config.eos_token_id
    width = max(map(len, prompts))
    tokens = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    chances = torch.rand(len(prompts), drawing.new_tokens, generator=torch.Generator().manual_seed(seed))
    past, drawn, ended = DynamicCache(config=model.config), [], torch.zeros(len(prompts), dtype=torch.bool)
    with precision(bf16):
        for step in range(drawing.new_tokens):
            places = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            made = model(
                input_ids=tokens, attention_mask=mask, position_ids=places, past_key_values=past, logits_to_keep=1
            )
            tokens = draw(made.logits[:, -1].float(), chances[:, step], drawing)
            drawn.append(tokens)
            ended |= tokens[:, 0] == end
            if ended.all():
                break
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], 1)
    return [_until(end, row) for row in torch.cat(drawn, 1).tolist()]


def draw(logits: torch.Tensor, chances: torch.Tensor, drawing: Drawing) -> torch.Tensor:
    """A token for each row: where its chance, a number from 0 to 1, falls among the likeliest tokens, best first."""
    scores, tokens = (logits / drawing.temperature).topk(min(drawing.top_k, logits.shape[1]))
    shares = scores.softmax(1)
    shares = shares.masked_fill(shares.cumsum(1) - shares >= drawing.top_p, 0.0)
    sums = shares.cumsum(1)
    place = (sums <= chances[:, None] * sums[:, -1:]).sum(1, keepdim=True)
    last = (shares > 0).sum(1, keepdim=True) - 1
    return tokens.gather(1, place.minimum(last))  # a chance of almost 1 may be rounded to all there is


def _until(end: int, row: list[int]) -> list[int]:
    return row[: row.index(end) + 1] if end in row else row
