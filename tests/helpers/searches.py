"""Small searches for tests: prompts, a reward, the arguments of the command line, and a silent transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from expo.demo import ALIGNED, SFT
from expo.demo.score import plain_words
from expo.search import search_alpha

PROMPTS = [
    *("Return the", "If the", "This module", "The function", "Raise an exception if", "A list", "The default value of"),
    *("When the", "Check if", "Note that the", "Create a new", "This class"),
]
ALPHAS = [0.5, 0.2]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Let transformers print errors only, and let torch use one thread.

    Another number of threads sums in another order, which may change a reply.
    """
    log: Any = transformers.logging
    verbosity, threads = log.get_verbosity(), torch.get_num_threads()
    log.set_verbosity_error()
    log.disable_progress_bar()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    log.set_verbosity(verbosity)
    log.enable_progress_bar()


def score(prompts: list[str], replies: list[str]) -> list[float]:
    """Return the demo's score of each reply."""
    assert len(prompts) == len(replies)
    return [plain_words(reply) for reply in replies]


def search_demo(out: Path, reward: Any = score, alphas: Any = ALPHAS, **options: Any) -> Any:
    """Search on the demo pair with short replies."""
    options = {"max_new_tokens": 12, "batch_size": 5, "device": "cpu", **options}
    return search_alpha(SFT, ALIGNED, options.pop("prompts", PROMPTS), reward, alphas, out, **options)


def command_words(
    pair: tuple[Path, Path], folder: Path, prompts: Sequence[str], reward: tuple[str, str], *more: str
) -> list[str]:
    """Write the prompts and the reward to a folder; return the arguments of a search that uses them.

    Args:
        pair: The folders sft and aligned.
        folder: The folder that takes prompts.txt and the module of the reward.
        prompts: The prompts.
        reward: The name of the module, which no other test may use, and its source, which defines `reward`.
        more: Further arguments.
    """
    name, source = reward
    (folder / "prompts.txt").write_text("\n".join(prompts))
    (folder / f"{name}.py").write_text(source)
    return [
        *("--sft", str(pair[0]), "--aligned", str(pair[1]), "--prompts", str(folder / "prompts.txt")),
        *("--reward", f"{name}:reward", "--device", "cpu", *more),
    ]
