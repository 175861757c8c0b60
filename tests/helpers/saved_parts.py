"""A training's processes that save a model in parts: `python saved_parts.py STORE RANK WORLD FOLDER [hybrid]`.

Rank 0 writes the whole model to FOLDER/whole. All processes write FOLDER/actor/model_world_size_N_rank_R.pt, as verl
does, and FOLDER/flat, FOLDER/nested and FOLDER/app, distributed checkpoints of torch.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

CONFIG = {"hidden_size": 10, "intermediate_size": 7, "num_hidden_layers": 2, "num_attention_heads": 2,
          "num_key_value_heads": 1, "head_dim": 6, "vocab_size": 11, "tie_word_embeddings": False,
          "model_type": "llama", "architectures": ["LlamaForCausalLM"]}  # fmt: skip
SHAPES = {"self_attn.q_proj": (12, 10), "self_attn.k_proj": (6, 10), "self_attn.v_proj": (6, 10),
          "self_attn.o_proj": (10, 12), "mlp.gate_proj": (7, 10), "mlp.up_proj": (7, 10), "mlp.down_proj": (10, 7),
          "input_layernorm": (10,), "post_attention_layernorm": (10,)}  # fmt: skip


def model(seed: int) -> torch.nn.Module:
    """Return the modules of a tiny Llama without their forward pass; the processes need not import transformers.

    No number of processes divides its 11 and 7 rows, and its last norm is fp32.
    """
    torch.manual_seed(seed)
    made = torch.nn.Module()
    shapes = {f"model.layers.{layer}.{name}": shape for layer in range(2) for name, shape in SHAPES.items()}
    for path, shape in {"model.embed_tokens": (11, 10), **shapes, "model.norm": (10,), "lm_head": (11, 10)}.items():
        module = made
        for name in path.split("."):
            if name not in module._modules:
                module.add_module(name, torch.nn.ModuleList() if name == "layers" else torch.nn.Module())
            module = module._modules[name]  # type: ignore[assignment]
        dtype = torch.float32 if path == "model.norm" else torch.bfloat16
        module.register_parameter("weight", torch.nn.Parameter(torch.randn(shape, dtype=dtype)))
    return made


def save_whole(made: torch.nn.Module, folder: Path) -> None:
    """Save a model in transformers' format."""
    folder.mkdir()
    save_file(made.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")


def save(folder: Path, rank: int, world: int, hybrid: bool) -> None:
    """Save the model of seed 2 in every form."""
    made = model(2)
    if not rank:
        save_whole(made, folder / "whole")
        (folder / "actor" / "huggingface").mkdir(parents=True)
        for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
            shutil.copy(folder / "whole" / name, folder / "actor" / "huggingface")
    dist.barrier()
    shape, names = ((2, world // 2), ("replicas", "parts")) if hybrid else ((world,), ("parts",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in made.model.layers:  # type: ignore[operator, union-attr]
        fully_shard(layer, mesh=mesh)
    fully_shard(made, mesh=mesh)
    state = made.state_dict()
    for name, placement in (("self_attn.o_proj", Shard(1)), ("mlp.down_proj", Replicate())):  # as tensor parallel does
        whole = state[f"model.layers.0.{name}.weight"].full_tensor()
        placements = [Replicate(), placement] if hybrid else [placement]
        state[f"model.layers.0.{name}.weight"] = distribute_tensor(whole, mesh, placements)
    state["model.layers.1.mlp.down_proj.weight"] = state["model.layers.1.mlp.down_proj.weight"].full_tensor()
    torch.save(state, folder / "actor" / f"model_world_size_{world}_rank_{rank}.pt")
    optimizer = {name: {"step": torch.tensor(1.0), "exp_avg": tensor} for name, tensor in state.items()}
    dcp.save(state, checkpoint_id=folder / "flat")
    dcp.save({"model": state, "optim": optimizer, "step": 7}, checkpoint_id=folder / "nested")
    dcp.save({"app": {"model": state, "optim": optimizer}}, checkpoint_id=folder / "app")


def main() -> None:
    store, rank, world, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    save(folder, rank, world, "hybrid" in sys.argv)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
