"""The command line: python -m expo.demo merges the embedded pair and compares the texts of the three models."""

from __future__ import annotations

import argparse
import os
import tempfile
import textwrap
from itertools import zip_longest
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from . import ALIGNED, SFT
from .score import plain_words

SHOWN_PROMPTS = ["Return the", "This module", "If the file", "The default"]
MEASURED_PROMPTS = [
    *("Return the", "If the", "This module", "The function", "Raise an", "A list", "The default", "When the"),
    *("Check if", "Note that", "Create a", "This class", "The value", "An object", "Called when", "You can"),
]
SAMPLES_PER_PROMPT = 48
NEW_TOKENS, TEMPERATURE = 32, 0.8  # the settings of the training
COLUMN = 31  # characters; three columns and two separators fill 99 characters of a line
LoadedModel = tuple[Any, Any]  # (model, tokenizer)


def load(folder: Path) -> LoadedModel:
    """Return a model and its tokenizer. The model is in fp32, in which CPUs are fastest."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def sample_texts(loaded: LoadedModel, prompts: list[str], texts_per_prompt: int, seed: int) -> list[str]:
    """Return sampled continuations of every prompt, those of one prompt together."""
    import torch

    model, tokenizer = loaded
    torch.manual_seed(seed)
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    tokens = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=NEW_TOKENS,
        num_return_sequences=texts_per_prompt,
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
    )
    width = batch["input_ids"].shape[1]
    texts: list[str] = tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True)
    return texts


def make_printable(text: str) -> str:
    """Return one line of ASCII, because byte-level tokens may spell any character, control characters included."""
    return "".join(char if " " <= char <= "~" else "?" for char in " ".join(text.split()))


def print_texts(models: dict[str, LoadedModel], seed: int) -> None:
    """Print one continuation of every shown prompt by each model, in columns, with its score."""
    texts_by_model = {name: sample_texts(model, SHOWN_PROMPTS, 1, seed) for name, model in models.items()}
    for number, prompt in enumerate(SHOWN_PROMPTS):
        print(f"\n{prompt} ...")
        columns = []
        for name, texts in texts_by_model.items():
            text = make_printable(texts[number])
            head = f"{name}  [{plain_words(text):.2f}]"
            columns.append([head, *textwrap.wrap(text, COLUMN)])
        for cells in zip_longest(*columns, fillvalue=""):
            print(" | ".join(cell.ljust(COLUMN) for cell in cells).rstrip(" "))


def print_means(models: dict[str, LoadedModel], seed: int) -> None:
    """Print each model's mean score over many continuations, and its gain over aligned, with standard errors."""
    print(f"\nmean score of {len(MEASURED_PROMPTS) * SAMPLES_PER_PROMPT} continuations, +- standard error")
    scores = {
        name: [plain_words(text) for text in sample_texts(model, MEASURED_PROMPTS, SAMPLES_PER_PROMPT, seed)]
        for name, model in models.items()
    }
    for name, values in scores.items():
        line = f"  {name:<20} {format_mean(values)}"
        if name != "aligned":
            # Both models have the same prompts and seed, so the gain is a mean of paired differences.
            gains = [value - base for value, base in zip(values, scores["aligned"], strict=True)]
            line += f"    against aligned {format_mean(gains, sign='+')}"
        print(line)


def format_mean(values: list[float], sign: str = "") -> str:
    """Return the mean and its standard error as text."""
    return f"{mean(values):{sign}.3f} +- {stdev(values) / len(values) ** 0.5:.3f}"


def run(alpha: float, out: Path, seed: int) -> None:
    """Merge the pair into `out`, then print the comparison of the three models."""
    import torch
    import transformers

    from ..merging.merge import merge

    log: Any = transformers.logging
    log.set_verbosity_error()
    log.disable_progress_bar()
    torch.set_num_threads(1)  # so that the printed samples do not depend on the number of cores
    merge(SFT, ALIGNED, alpha, out)
    folders = {"sft": SFT, "aligned": ALIGNED, f"merged, alpha {alpha:g}": out}
    models = {name: load(folder) for name, folder in folders.items()}
    print("The score is the share of short, plain, unrepeated words in a continuation (expo/demo/score.py).")
    print_texts(models, seed)
    print_means(models, seed)


def main() -> None:
    """Read the options and run the demonstration, in a temporary folder if the user names none."""
    parser = argparse.ArgumentParser(
        prog="python -m expo.demo",
        description="Merge the embedded pair, sft and aligned, and compare the texts of the three models.",
    )
    parser.add_argument(
        "--alpha", type=float, default=0.5, help="how far the merge goes past aligned (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="keep the merged checkpoint in this folder, which must not exist")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the sampling (default: %(default)s)")
    options = parser.parse_args()
    if options.out is not None and options.out.exists():
        parser.error(f"{options.out} exists already")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as scratch:
        run(options.alpha, options.out or Path(scratch) / "merged", options.seed)


if __name__ == "__main__":
    main()
