"""Train the demo pair from scratch: python -m expo.demo.train --out DIR (some minutes on one CPU core).

The text is the English prose that comes with CPython: the topics of the language reference behind `help()`, and the
docstrings of the standard library. The sft checkpoint is a small Llama that was trained to write such paragraphs. The
aligned checkpoint is that model after a short round of DPO on its own samples, ranked by `expo.demo.score.plain_words`.
The round is so short that the model is only partly aligned, which is the case that extrapolation is meant for.

The seeds are fixed, and one thread is used. A repeated run gives the same weights if CPython, torch, transformers and
tokenizers have the same versions and the CPU is of the same kind. Other versions have another text or another rounding,
and give a different pair of about the same behaviour.
"""

from __future__ import annotations

import argparse
import ast
import math
import os
import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# torch and transformers are imported in the functions that use them. Their objects have the type Any, because many of
# their methods have no annotations.
PreferencePair = tuple[list[int], list[int], list[int]]  # tokens of the prompt, the better and the worse continuation

THREADS = 1  # every thread has sums of its own, so another number of threads gives slightly other weights
VOCABULARY = 1536  # tokens
BOS, EOS, PAD = 0, 1, 2
SPECIAL_TOKENS = ["<s>", "</s>", "<pad>"]

SFT_STEPS, SFT_BATCH, SFT_LENGTH, SFT_LR = 2200, 16, 128, 4e-3

TEMPERATURE = 0.8  # at 1.0 a model of this size writes too much nonsense
DPO_PROMPTS, DPO_CANDIDATES, DPO_NEW_TOKENS = 1024, 4, 32
DPO_STEPS, DPO_BATCH, DPO_LR, DPO_BETA = 32, 32, 2e-4, 0.1

SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def docstrings() -> Iterator[str]:
    """Yield every docstring of the standard library, from its source files, without importing them."""
    root = Path(os.__file__).parent
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield ast.get_docstring(node) or ""


def is_prose(paragraph: str) -> bool:
    """Return True if a paragraph consists of English sentences, not of code, a table or a heading."""
    words = paragraph.split()
    plain = sum(word.strip(".,;:()\"'").isalpha() for word in words)
    return len(words) >= 6 and paragraph[0].isupper() and paragraph[-1] in ".:" and plain > 0.75 * len(words)


def collect_paragraphs() -> list[str]:
    """Return the distinct paragraphs of prose that come with this CPython, in a fixed order."""
    from pydoc_data.topics import topics

    texts = [*topics.values(), *docstrings()]
    paragraphs = {" ".join(part.split()) for text in texts for part in re.split(r"\n\s*\n", text)}
    return sorted(filter(is_prose, paragraphs))


def build_tokenizer(texts: list[str]) -> Any:
    """Return a byte-level BPE tokenizer that puts the beginning-of-text token before every prompt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    make: Any = PreTrainedTokenizerFast
    return make(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",  # the prompts of a batch must end at the same column
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def build_model() -> Any:
    """Return an untrained Llama with about a million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def set_learning_rate(optimizer: Any, peak: float, step: int, steps: int, warmup: int) -> None:
    """Set the learning rate of a step: a linear warm-up to the peak, then a cosine down to 0."""
    rest = (step - warmup) / max(1, steps - warmup)
    scale = step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * rest))
    for group in optimizer.param_groups:
        group["lr"] = peak * scale


def train_sft(model: Any, tokenizer: Any, texts: list[str]) -> None:
    """Train to predict the next token of the paragraphs, shuffled and joined to one sequence."""
    import torch

    encoded = [[*tokenizer(text)["input_ids"], EOS] for text in texts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=SFT_LR, betas=(0.9, 0.95), weight_decay=0.1)
    order = random.Random(0)
    queue: list[int] = []
    batch_tokens = SFT_BATCH * SFT_LENGTH
    started = time.monotonic()
    for step in range(1, SFT_STEPS + 1):
        while len(queue) < batch_tokens:
            order.shuffle(encoded)
            queue.extend(token for paragraph in encoded for token in paragraph)
        batch = torch.tensor(queue[:batch_tokens]).view(SFT_BATCH, SFT_LENGTH)
        del queue[:batch_tokens]
        set_learning_rate(optimizer, SFT_LR, step, SFT_STEPS, warmup=100)
        loss = model(input_ids=batch, labels=batch).loss
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            seconds = time.monotonic() - started
            print(f"sft step {step}/{SFT_STEPS}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)


def sample_pairs(model: Any, tokenizer: Any, texts: list[str]) -> list[PreferencePair]:
    """Return a pair for each prompt: the samples with the highest and the lowest score."""
    import torch

    plain_words = load_score()
    openings = [" ".join(text.split()[:2]) for text in random.Random(1).sample(texts, DPO_PROMPTS)]
    pairs = []
    for start in range(0, DPO_PROMPTS, 64):
        prompts = tokenizer(openings[start : start + 64], padding=True, return_tensors="pt")
        width = prompts["input_ids"].shape[1]
        samples = model.generate(
            input_ids=prompts["input_ids"],
            attention_mask=prompts["attention_mask"],
            max_new_tokens=DPO_NEW_TOKENS,
            num_return_sequences=DPO_CANDIDATES,
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
        )
        for row, group in enumerate(torch.split(samples, DPO_CANDIDATES)):
            tails = [[token for token in tail if token != PAD] for tail in group[:, width:].tolist()]
            scored = [(plain_words(tokenizer.decode(tail, skip_special_tokens=True)), tail) for tail in tails]
            worst, best = min(scored), max(scored)
            if best[0] > worst[0]:
                pairs.append((tokenizer(openings[start + row])["input_ids"], best[1], worst[1]))
    return pairs


def log_probabilities(model: Any, prompts: list[list[int]], tails: list[list[int]]) -> Any:
    """Return the log-probability of each continuation after its prompt, summed over its tokens."""
    import torch

    rows = [torch.tensor(prompt + tail) for prompt, tail in zip(prompts, tails, strict=True)]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    scored = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, (prompt, tail) in enumerate(zip(prompts, tails, strict=True)):
        scored[row, len(prompt) : len(prompt) + len(tail)] = True
    # The padding is on the right, so causal attention hides it from every scored token.
    logps = torch.log_softmax(model(input_ids=tokens[:, :-1]).logits.float(), dim=-1)
    chosen = logps.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return (chosen * scored[:, 1:]).sum(dim=-1)


def train_dpo(model: Any, reference: Any, pairs: list[PreferencePair]) -> None:
    """Train a model by direct preference optimisation for a small, fixed number of steps."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=DPO_LR, betas=(0.9, 0.95), weight_decay=0.0)
    draw = random.Random(2)
    for step in range(1, DPO_STEPS + 1):
        prompts, better, worse = map(list, zip(*draw.sample(pairs, DPO_BATCH), strict=True))
        set_learning_rate(optimizer, DPO_LR, step, DPO_STEPS, warmup=10)
        with torch.no_grad():
            base = log_probabilities(reference, prompts + prompts, better + worse)
        gain = log_probabilities(model, prompts + prompts, better + worse) - base
        margin = gain[:DPO_BATCH] - gain[DPO_BATCH:]
        loss = -torch.nn.functional.logsigmoid(DPO_BETA * margin).mean()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 8 == 0:
            accuracy = (margin > 0).float().mean().item()
            print(f"dpo step {step}/{DPO_STEPS}  loss {loss.item():.3f}  accuracy {accuracy:.2f}", flush=True)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a bf16 checkpoint in two shards, which every user of the system may read."""
    import torch
    from transformers import GenerationConfig

    copy = build_model().to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    make: Any = GenerationConfig
    copy.generation_config = make(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=True, temperature=TEMPERATURE, top_k=0
    )
    half = sum(weight.numel() * weight.element_size() for weight in copy.parameters()) * 11 // 20
    copy.save_pretrained(folder, max_shard_size=half)
    tokenizer.save_pretrained(folder)
    # transformers 5 writes a new name of the class. Both 4 and 5 read the old name.
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    for path in folder.iterdir():
        path.chmod(0o644)


def load_score() -> Any:
    """Return the score function, also if this file runs as a plain script from a source tree."""
    root = str(Path(__file__).resolve().parents[2])
    if not __package__ and root not in sys.path:
        sys.path.insert(0, root)
    from expo.demo.score import plain_words

    return plain_words


def load(folder: Path) -> Any:
    """Return a stored checkpoint in fp32, in which it is trained further."""
    import torch
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def main() -> None:
    """Train both checkpoints into OUT/sft and OUT/aligned."""
    parser = argparse.ArgumentParser(description="Train the demo pair from scratch.")
    parser.add_argument("--out", type=Path, required=True, help="the folder for sft/ and aligned/")
    out: Path = parser.parse_args().out
    import torch
    import transformers

    log: Any = transformers.logging
    log.set_verbosity_error()
    log.disable_progress_bar()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    texts = collect_paragraphs()
    print(f"{len(texts)} paragraphs, {sum(map(len, texts))} characters", flush=True)
    tokenizer = build_tokenizer(texts)
    if not (out / "sft" / "config.json").exists():  # a first stage that is complete is not repeated
        torch.manual_seed(0)
        model = build_model()
        print(f"{sum(weight.numel() for weight in model.parameters())} parameters", flush=True)
        train_sft(model, tokenizer, texts)
        save(model, tokenizer, out / "sft")
    # The policy and its reference start from the rounded weights, which are those that are stored and merged.
    reference, policy = load(out / "sft").eval(), load(out / "sft").eval()
    torch.manual_seed(1)
    pairs = sample_pairs(reference, tokenizer, texts)
    print(f"{len(pairs)} preference pairs", flush=True)
    train_dpo(policy, reference, pairs)
    save(policy, tokenizer, out / "aligned")


if __name__ == "__main__":
    main()
