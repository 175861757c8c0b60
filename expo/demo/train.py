"""Train the demo pair from scratch: `python -m expo.demo.train --out DIR` (some minutes on one CPU core).

The text is the English prose that ships with CPython: the language reference topics behind `help()` and the
docstrings of the standard library. The SFT checkpoint is a small Llama trained to write such paragraphs. The
aligned checkpoint is that model after a short round of DPO on its own samples, ranked by
`expo.demo.score.plain_words`, and stopped long before the preference is exhausted: a partially aligned model
is what extrapolation is meant for.

Seeds are fixed and one thread is used, so a repeated run with the same CPython, torch, transformers and
tokenizers on the same kind of CPU gives the same weights. Other versions bring other text or other rounding,
and so a different pair of about the same behaviour.
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

# torch and transformers are imported where they are used, and their objects are typed as Any: both packages
# leave many of the methods called here without annotations.
Pair = tuple[list[int], list[int], list[int]]  # prompt, better and worse continuation, as tokens

THREADS = 1  # sums are split by thread, so another number gives slightly other weights
VOCAB = 1536
BOS, EOS, PAD = 0, 1, 2
SPECIAL = ["<s>", "</s>", "<pad>"]

SFT_STEPS, SFT_BATCH, SFT_LENGTH, SFT_LR = 2200, 16, 128, 4e-3

TEMPERATURE = 0.8  # a model this small wanders off at 1.0
DPO_PROMPTS, DPO_CANDIDATES, DPO_NEW_TOKENS = 1024, 4, 32
DPO_STEPS, DPO_BATCH, DPO_LR, DPO_BETA = 32, 32, 2e-4, 0.1

SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def docstrings() -> Iterator[str]:
    """Every docstring of the standard library, read from its source without importing it."""
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
    """Whether a paragraph reads as English sentences rather than as code, a table or a heading."""
    words = paragraph.split()
    plain = sum(word.strip(".,;:()\"'").isalpha() for word in words)
    return len(words) >= 6 and paragraph[0].isupper() and paragraph[-1] in ".:" and plain > 0.75 * len(words)


def corpus() -> list[str]:
    """The distinct prose paragraphs that ship with this CPython, in a fixed order."""
    from pydoc_data.topics import topics

    texts = [*topics.values(), *docstrings()]
    paragraphs = {" ".join(part.split()) for text in texts for part in re.split(r"\n\s*\n", text)}
    return sorted(filter(is_prose, paragraphs))


def build_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE tokenizer that puts the beginning-of-text token before every prompt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    make: Any = PreTrainedTokenizerFast
    return make(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",  # prompts of one batch must end together for generation
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def build_model() -> Any:
    """An untrained Llama of about a million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
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


def set_rates(optimizer: Any, peak: float, step: int, steps: int, warmup: int) -> None:
    """Linear warm-up to the peak learning rate, then a cosine down to nothing."""
    rest = (step - warmup) / max(1, steps - warmup)
    scale = step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * rest))
    for group in optimizer.param_groups:
        group["lr"] = peak * scale


def train_sft(model: Any, tokenizer: Any, texts: list[str]) -> None:
    """Ordinary next-token training on the paragraphs, shuffled and laid end to end."""
    import torch

    encoded = [[*tokenizer(text)["input_ids"], EOS] for text in texts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=SFT_LR, betas=(0.9, 0.95), weight_decay=0.1)
    order = random.Random(0)
    queue: list[int] = []
    need = SFT_BATCH * SFT_LENGTH
    started = time.monotonic()
    for step in range(1, SFT_STEPS + 1):
        while len(queue) < need:
            order.shuffle(encoded)
            queue.extend(token for paragraph in encoded for token in paragraph)
        batch = torch.tensor(queue[:need]).view(SFT_BATCH, SFT_LENGTH)
        del queue[:need]
        set_rates(optimizer, SFT_LR, step, SFT_STEPS, warmup=100)
        loss = model(input_ids=batch, labels=batch).loss
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            seconds = time.monotonic() - started
            print(f"sft step {step}/{SFT_STEPS}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)


def sample_pairs(model: Any, tokenizer: Any, texts: list[str]) -> list[Pair]:
    """(prompt, better, worse) token lists: the extremes, by score, of several samples for each prompt."""
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


def continuation_logps(model: Any, prompts: list[list[int]], tails: list[list[int]]) -> Any:
    """Log-probability of each continuation given its prompt, summed over its tokens."""
    import torch

    rows = [torch.tensor(prompt + tail) for prompt, tail in zip(prompts, tails, strict=True)]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    scored = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, (prompt, tail) in enumerate(zip(prompts, tails, strict=True)):
        scored[row, len(prompt) : len(prompt) + len(tail)] = True
    # Padding stands on the right, where causal attention never lets a scored token see it.
    logps = torch.log_softmax(model(input_ids=tokens[:, :-1]).logits.float(), dim=-1)
    chosen = logps.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return (chosen * scored[:, 1:]).sum(dim=-1)


def train_dpo(model: Any, reference: Any, pairs: list[Pair]) -> None:
    """Direct preference optimisation, for a fixed small number of steps."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=DPO_LR, betas=(0.9, 0.95), weight_decay=0.0)
    draw = random.Random(2)
    for step in range(1, DPO_STEPS + 1):
        prompts, better, worse = map(list, zip(*draw.sample(pairs, DPO_BATCH), strict=True))
        set_rates(optimizer, DPO_LR, step, DPO_STEPS, warmup=10)
        with torch.no_grad():
            base = continuation_logps(reference, prompts + prompts, better + worse)
        gain = continuation_logps(model, prompts + prompts, better + worse) - base
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
    """Write a bfloat16 checkpoint in two shards, readable by everyone."""
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
    # transformers 5 writes its own new name of the class; the old one is understood by 4 and 5.
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    for path in folder.iterdir():
        path.chmod(0o644)


def load_score() -> Any:
    """The score function, also when this file is run as a plain script from a source tree."""
    root = str(Path(__file__).resolve().parents[2])
    if not __package__ and root not in sys.path:
        sys.path.insert(0, root)
    from expo.demo.score import plain_words

    return plain_words


def load(folder: Path) -> Any:
    """A stored checkpoint in single precision, the precision that training goes on in."""
    import torch
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def main() -> None:
    """Train both checkpoints into OUT/sft and OUT/aligned."""
    parser = argparse.ArgumentParser(description="train the demo pair from scratch")
    parser.add_argument("--out", type=Path, required=True, help="folder for sft/ and aligned/")
    out: Path = parser.parse_args().out
    import torch
    import transformers

    log: Any = transformers.logging
    log.set_verbosity_error()
    log.disable_progress_bar()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    texts = corpus()
    print(f"{len(texts)} paragraphs, {sum(map(len, texts))} characters", flush=True)
    tokenizer = build_tokenizer(texts)
    if not (out / "sft" / "config.json").exists():  # a finished first stage is not repeated
        torch.manual_seed(0)
        model = build_model()
        print(f"{sum(weight.numel() for weight in model.parameters())} parameters", flush=True)
        train_sft(model, tokenizer, texts)
        save(model, tokenizer, out / "sft")
    # Both sides of the preference training start from the rounded weights that are stored and merged.
    reference, policy = load(out / "sft").eval(), load(out / "sft").eval()
    torch.manual_seed(1)
    pairs = sample_pairs(reference, tokenizer, texts)
    print(f"{len(pairs)} preference pairs", flush=True)
    train_dpo(policy, reference, pairs)
    save(policy, tokenizer, out / "aligned")


if __name__ == "__main__":
    main()
