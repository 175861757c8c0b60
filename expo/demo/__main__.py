"""Merge the embedded demo pair and compare what the three models write: `python -m expo.demo`."""

from __future__ import annotations

import argparse
import os
import tempfile
import textwrap
from itertools import zip_longest
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from expo.demo import ALIGNED, SFT
from expo.demo.score import plain_words

SHOWN = ["Return the", "This module", "If the file", "The default"]
MEASURED = [
    *("Return the", "If the", "This module", "The function", "Raise an", "A list", "The default", "When the"),
    *("Check if", "Note that", "Create a", "This class", "The value", "An object", "Called when", "You can"),
]
SAMPLES_PER_PROMPT = 48
NEW_TOKENS, TEMPERATURE = 32, 0.8  # as in training
COLUMN = 31  # three of them and two separators fill 99 of 100 columns


def load(folder: Path) -> tuple[Any, Any]:
    """The model in single precision, which CPUs are fastest at, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def complete(loaded: tuple[Any, Any], prompts: list[str], each: int, seed: int) -> list[str]:
    """Sampled continuations, `each` for every prompt in turn."""
    import torch

    model, tokenizer = loaded
    torch.manual_seed(seed)
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    tokens = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=NEW_TOKENS,
        num_return_sequences=each,
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
    )
    width = batch["input_ids"].shape[1]
    texts: list[str] = tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True)
    return texts


def printable(text: str) -> str:
    """One line of plain ASCII: byte-level tokens can spell anything, control characters included."""
    return "".join(char if " " <= char <= "~" else "?" for char in " ".join(text.split()))


def show_completions(models: dict[str, tuple[Any, Any]], seed: int) -> None:
    """One continuation of every shown prompt by each model, in columns, with its score."""
    written = {name: complete(model, SHOWN, 1, seed) for name, model in models.items()}
    for number, prompt in enumerate(SHOWN):
        print(f"\n{prompt} ...")
        columns = []
        for name, texts in written.items():
            text = printable(texts[number])
            head = f"{name}  [{plain_words(text):.2f}]"
            columns.append([head, *textwrap.wrap(text, COLUMN)])
        for cells in zip_longest(*columns, fillvalue=""):
            print(" | ".join(cell.ljust(COLUMN) for cell in cells).rstrip(" "))


def show_means(models: dict[str, tuple[Any, Any]], seed: int) -> None:
    """Mean score over many continuations, and the gain over the aligned model, each with a standard error."""
    print(f"\nmean score of {len(MEASURED) * SAMPLES_PER_PROMPT} continuations, +- standard error")
    scores = {
        name: [plain_words(text) for text in complete(model, MEASURED, SAMPLES_PER_PROMPT, seed)]
        for name, model in models.items()
    }
    for name, values in scores.items():
        line = f"  {name:<20} {with_error(values)}"
        if name != "aligned":
            # Same prompts and same seed, so the gain is taken pair by pair.
            gains = [value - base for value, base in zip(values, scores["aligned"], strict=True)]
            line += f"    against aligned {with_error(gains, sign='+')}"
        print(line)


def with_error(values: list[float], sign: str = "") -> str:
    """Mean and standard error, for printing."""
    return f"{mean(values):{sign}.3f} +- {stdev(values) / len(values) ** 0.5:.3f}"


def run(alpha: float, out: Path, seed: int) -> None:
    """Merge into `out`, then print the comparison."""
    import torch
    import transformers

    import expo

    log: Any = transformers.logging
    log.set_verbosity_error()
    log.disable_progress_bar()
    torch.set_num_threads(1)  # so that the printed samples do not depend on the number of cores
    expo.merge(SFT, ALIGNED, alpha, out)
    folders = {"sft": SFT, "aligned": ALIGNED, f"merged, alpha {alpha:g}": out}
    models = {name: load(folder) for name, folder in folders.items()}
    print("The score is the share of short, plain, unrepeated words in a continuation (expo/demo/score.py).")
    show_completions(models, seed)
    show_means(models, seed)


def main() -> None:
    """Read the options and run the demo, in a temporary folder unless one is named."""
    parser = argparse.ArgumentParser(
        prog="python -m expo.demo",
        description="merge the embedded SFT and aligned checkpoints and compare the three models",
    )
    parser.add_argument("--alpha", type=float, default=0.5, help="extrapolation strength (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="keep the merged checkpoint in this new folder")
    parser.add_argument("--seed", type=int, default=0, help="sampling seed (default: %(default)s)")
    options = parser.parse_args()
    if options.out is not None and options.out.exists():
        parser.error(f"{options.out} exists already")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as scratch:
        run(options.alpha, options.out or Path(scratch) / "merged", options.seed)


if __name__ == "__main__":
    main()
