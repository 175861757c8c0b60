"""Run one of the programs that people use today: python bench/rival_programs.py loop|short|paper SFT ALIGNED ALPHA OUT

loop: the usual script. It reads one tensor at a time with safetensors and torch, and saves each shard at its end.
short: the best short program in plain PyTorch. It maps the inputs, calls torch.lerp for a chunk into one buffer, and
    writes the chunk. Both checkpoints must have the same files and layout. torch.lerp rounds some results differently.
paper: the steps of the paper's script. It loads both models in bf16 with transformers, computes the expression for
    every tensor in bf16 and in place, and calls save_pretrained.

Every program prints its seconds, without those of its imports. No program syncs its output to the disk.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

CHUNK_BYTES = 8 << 20


def loop(sft: Path, aligned: Path, alpha: float, out: Path) -> None:
    """Load both tensors, compute in fp32, keep the results of a shard, and save the shard."""
    for path in sorted(aligned.glob("*.safetensors")):
        merged = {}
        with safe_open(path, "pt") as aligned_file, safe_open(sft / path.name, "pt") as sft_file:
            for name in aligned_file.keys():  # noqa: SIM118, safe_open is no dict
                a, s = aligned_file.get_tensor(name).float(), sft_file.get_tensor(name).float()
                merged[name] = (a + alpha * (a - s)).to(torch.bfloat16)
        save_file(merged, out / path.name, metadata={"format": "pt"})


def short(sft: Path, aligned: Path, alpha: float, out: Path) -> None:
    """Treat every shard as one array of bf16."""
    buffer = torch.empty(CHUNK_BYTES // 2, dtype=torch.bfloat16)
    data = memoryview(buffer.view(torch.uint8).numpy())
    for path in sorted(aligned.glob("*.safetensors")):
        size = os.path.getsize(path)
        aligned_bytes = torch.from_file(str(path), size=size, dtype=torch.uint8)
        sft_bytes = torch.from_file(str(sft / path.name), size=size, dtype=torch.uint8)
        start = 8 + int.from_bytes(bytes(aligned_bytes[:8].tolist()), "little")
        with open(out / path.name, "wb", buffering=0) as file:
            file.write(aligned_bytes[:start].numpy())
            for at in range(start, size, CHUNK_BYTES):
                stop = min(at + CHUNK_BYTES, size)
                a, s = aligned_bytes[at:stop].view(torch.bfloat16), sft_bytes[at:stop].view(torch.bfloat16)
                torch.lerp(s, a, 1 + alpha, out=buffer[: len(a)])
                file.write(data[: stop - at])


def paper(sft: Path, aligned: Path, alpha: float, out: Path) -> None:
    """Load two whole models into memory; each step also takes the temporaries of one tensor."""
    from transformers import AutoModelForCausalLM

    sft_model, model = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for path in (sft, aligned))
    sft_weights = sft_model.state_dict()
    with torch.no_grad():
        for name, a in model.state_dict().items():
            a.copy_(a + alpha * (a - sft_weights[name]))
    model.save_pretrained(out)


PROGRAMS = {"loop": loop, "short": short, "paper": paper}

if __name__ == "__main__":
    program, sft, aligned, alpha, out = sys.argv[1:]
    Path(out).mkdir()
    start = time.perf_counter()
    PROGRAMS[program](Path(sft), Path(aligned), float(alpha), Path(out))
    for path in Path(aligned).glob("*.json") if program != "paper" else ():
        shutil.copy(path, out)
    print(time.perf_counter() - start)
