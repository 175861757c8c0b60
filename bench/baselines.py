"""What people run today, as programs: python bench/baselines.py loop|short|paper SFT ALIGNED ALPHA OUT

loop: the usual script, one tensor at a time through safetensors and torch, a shard saved at the end of each.
short: the best short plain-PyTorch program: mapped inputs, chunked torch.lerp into one buffer, one write a chunk. It
    relies on both checkpoints having the same files and layout, and torch.lerp rounds some results otherwise.
paper: what the paper's script does: both models in bf16 through transformers, the expression on every tensor, in bf16
    and in place, and save_pretrained.
All print their own seconds, the imports not counted; none syncs what it writes.
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

CHUNK = 8 << 20  # bytes


def loop(sft: Path, aligned: Path, alpha: float, out: Path) -> None:
    """Load both tensors, compute in fp32, keep the results of a shard, save the shard."""
    for path in sorted(aligned.glob("*.safetensors")):
        merged = {}
        with safe_open(path, "pt") as strong, safe_open(sft / path.name, "pt") as weak:
            for name in strong.keys():  # noqa: SIM118, safe_open is no dict
                a, s = strong.get_tensor(name).float(), weak.get_tensor(name).float()
                merged[name] = (a + alpha * (a - s)).to(torch.bfloat16)
        save_file(merged, out / path.name, metadata={"format": "pt"})


def short(sft: Path, aligned: Path, alpha: float, out: Path) -> None:
    """Every shard as one array of bf16."""
    buffer = torch.empty(CHUNK // 2, dtype=torch.bfloat16)
    data = memoryview(buffer.view(torch.uint8).numpy())
    for path in sorted(aligned.glob("*.safetensors")):
        size = os.path.getsize(path)
        strong = torch.from_file(str(path), size=size, dtype=torch.uint8)
        weak = torch.from_file(str(sft / path.name), size=size, dtype=torch.uint8)
        start = 8 + int.from_bytes(bytes(strong[:8].tolist()), "little")
        with open(out / path.name, "wb", buffering=0) as file:
            file.write(strong[:start].numpy())
            for at in range(start, size, CHUNK):
                stop = min(at + CHUNK, size)
                a, s = strong[at:stop].view(torch.bfloat16), weak[at:stop].view(torch.bfloat16)
                torch.lerp(s, a, 1 + alpha, out=buffer[: len(a)])
                file.write(data[: stop - at])


def paper(sft: Path, aligned: Path, alpha: float, out: Path) -> None:
    """Two whole models in memory, and the temporaries of one tensor."""
    from transformers import AutoModelForCausalLM

    weak, strong = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for path in (sft, aligned))
    theirs = weak.state_dict()
    with torch.no_grad():
        for name, a in strong.state_dict().items():
            a.copy_(a + alpha * (a - theirs[name]))
    strong.save_pretrained(out)


PROGRAMS = {"loop": loop, "short": short, "paper": paper}

if __name__ == "__main__":
    program, sft, aligned, alpha, out = sys.argv[1:]
    Path(out).mkdir()
    began = time.perf_counter()
    PROGRAMS[program](Path(sft), Path(aligned), float(alpha), Path(out))
    for path in Path(aligned).glob("*.json") if program != "paper" else ():
        shutil.copy(path, out)
    print(time.perf_counter() - began)
