"""The paper's twelve pairs as on the hub, but without data: their names, shapes, dtypes and kinds of file.

The files are sparse, so a pair of 70B takes a megabyte of disk and reads as zeros. The sizes are those of the public
configs. The kinds and numbers of files are those of the repositories. For the repositories in `CHOSEN` they are not
known, so the usual ones of the model's maker and size are used.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from checkpoint_files import sparse_file

Shapes = dict[str, tuple[int, ...]]
Files = tuple[tuple[str, int], ...]  # (safetensors or bin, the number of files)


class Model(NamedTuple):
    """The sizes of an architecture; `heads` and `kv` are the numbers of heads for queries and for keys and values."""

    kind: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv: int
    vocabulary: int

    @property
    def head(self) -> int:
        return self.hidden // self.heads


class Pair(NamedTuple):
    """One of the paper's pairs; `params_b` is the published number of parameters in billions."""

    model: Model
    params_b: float
    sft: str
    sft_files: Files
    aligned: str
    aligned_files: Files


MISTRAL = Model("mistral", 4096, 14336, 32, 32, 8, 32000)
MISTRAL_TURNS = MISTRAL._replace(vocabulary=32002)
LLAMA3_8B = Model("llama", 4096, 14336, 32, 32, 8, 128256)
LLAMA2_7B = Model("llama", 4096, 11008, 32, 32, 32, 32000)
LLAMA2_13B = Model("llama", 5120, 13824, 40, 40, 40, 32000)
LLAMA2_70B = Model("llama", 8192, 28672, 80, 64, 8, 32000)
INTERNLM2_1B8 = Model("internlm2", 2048, 8192, 24, 16, 8, 92544)
INTERNLM2_7B = Model("internlm2", 4096, 14336, 32, 32, 8, 92544)
INTERNLM2_20B = Model("internlm2", 6144, 16384, 48, 48, 8, 92544)


def _files(text: str) -> Files:
    """Return a text such as `safetensors 3, bin 2` as pairs."""
    return tuple((kind, int(number)) for kind, number in (part.split() for part in text.split(", ")))


def _pair(model: Model, params_b: float, sft: str, sft_files: str, aligned: str, aligned_files: str) -> Pair:
    return Pair(model, params_b, sft, _files(sft_files), aligned, _files(aligned_files))


PAIRS = {
    "zephyr-7b-alpha": _pair(
        MISTRAL, 7.242, "mistral-7b-sft-alpha", "bin 2", "zephyr-7b-alpha", "safetensors 2, bin 2"
    ),
    "zephyr-7b-beta": _pair(
        MISTRAL, 7.242, "mistral-7b-sft-beta", "safetensors 2", "zephyr-7b-beta", "safetensors 8, bin 8"
    ),
    "starling-lm-7b-alpha": _pair(
        MISTRAL_TURNS, 7.242, "openchat_3.5", "bin 2", "Starling-LM-7B-alpha", "safetensors 3"
    ),
    "starling-lm-7b-beta": _pair(
        MISTRAL_TURNS, 7.242, "openchat-3.5-0106", "safetensors 3", "Starling-LM-7B-beta", "safetensors 3"
    ),
    "snorkel-mistral-pairrm": _pair(
        MISTRAL, 7.242, "Mistral-7B-Instruct-v0.2", "safetensors 3, bin 3", "Snorkel-Mistral-PairRM-DPO", "bin 1"
    ),
    "llama3-iterative-dpo": _pair(
        LLAMA3_8B, 8.030, "LLaMA3-SFT", "safetensors 4", "LLaMA3-iterative-DPO-final", "safetensors 4"
    ),
    "internlm2-chat-1.8b": _pair(
        INTERNLM2_1B8, 1.889, "internlm2-chat-1_8b-sft", "safetensors 2", "internlm2-chat-1_8b", "safetensors 2"
    ),
    "internlm2-chat-7b": _pair(
        INTERNLM2_7B, 7.738, "internlm2-chat-7b-sft", "safetensors 8", "internlm2-chat-7b", "safetensors 8"
    ),
    "internlm2-chat-20b": _pair(
        INTERNLM2_20B, 19.861, "internlm2-chat-20b-sft", "safetensors 21", "internlm2-chat-20b", "safetensors 21"
    ),
    "tulu-2-dpo-7b": _pair(LLAMA2_7B, 6.738, "tulu-2-7b", "bin 2", "tulu-2-dpo-7b", "bin 2"),
    "tulu-2-dpo-13b": _pair(LLAMA2_13B, 13.016, "tulu-2-13b", "bin 3", "tulu-2-dpo-13b", "bin 3, safetensors 3"),
    "tulu-2-dpo-70b": _pair(LLAMA2_70B, 68.977, "tulu-2-70b", "bin 15", "tulu-2-dpo-70b", "bin 15"),
}

# The properties that are not known: the kind of the files, or else their number.
CHOSEN = {
    "zephyr-7b-alpha": "sft: kind (likely bin) and number; aligned: numbers",
    "zephyr-7b-beta": "aligned: numbers",
    "snorkel-mistral-pairrm": "sft: kinds and numbers; aligned: number (one file, with a pickled OrderedDict)",
    "internlm2-chat-1.8b": "aligned: kind and number",
    "internlm2-chat-20b": "both: kind and number",
    "tulu-2-dpo-13b": "both: number of .bin files",
}


@cache
def shapes(recipe: str) -> Shapes:
    """Return the shapes of the parameters by name, in the model's order; sft and aligned have the same."""
    model = PAIRS[recipe].model
    return _internlm2(model) if model.kind == "internlm2" else _llama(model)


def buffers(recipe: str) -> Shapes:
    """Return the fp32 buffers that only sft has: old versions of transformers saved Llama's rotary frequencies."""
    if recipe != "tulu-2-dpo-7b":
        return {}
    model = PAIRS[recipe].model
    return {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (model.head // 2,) for i in range(model.layers)}


def _llama(model: Model) -> Shapes:
    """Return the shapes of a Llama or a Mistral, which has the same names."""
    hidden, inner, keys = model.hidden, model.inner, model.kv * model.head
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    return {
        "model.embed_tokens.weight": (model.vocabulary, hidden),
        **{f"model.layers.{i}.{name}.weight": shape for i in range(model.layers) for name, shape in layer.items()},
        "model.norm.weight": (hidden,),
        "lm_head.weight": (model.vocabulary, hidden),
    }


def _internlm2(model: Model) -> Shapes:
    hidden, inner = model.hidden, model.inner
    layer = {
        "attention.wqkv": ((model.heads + 2 * model.kv) * model.head, hidden),
        "attention.wo": (hidden, hidden),
        "feed_forward.w1": (inner, hidden),
        "feed_forward.w3": (inner, hidden),
        "feed_forward.w2": (hidden, inner),
        "attention_norm": (hidden,),
        "ffn_norm": (hidden,),
    }
    return {
        "model.tok_embeddings.weight": (model.vocabulary, hidden),
        **{f"model.layers.{i}.{name}.weight": shape for i in range(model.layers) for name, shape in layer.items()},
        "model.norm.weight": (hidden,),
        "output.weight": (model.vocabulary, hidden),
    }


def config(recipe: str) -> dict[str, Any]:
    """Return the object in config.json."""
    model = PAIRS[recipe].model
    classes = {"mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM", "internlm2": "InternLM2ForCausalLM"}
    found: dict[str, Any] = {
        "architectures": [classes[model.kind]],
        "model_type": model.kind,
        "hidden_size": model.hidden,
        "intermediate_size": model.inner,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv,
        "vocab_size": model.vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    if model.kind == "internlm2":
        causal = "modeling_internlm2.InternLM2ForCausalLM"
        code = {"AutoConfig": "configuration_internlm2.InternLM2Config", "AutoModelForCausalLM": causal}
        found["auto_map"] = code | {"AutoModel": causal}
    return found


def code_files(recipe: str) -> set[str]:
    """Return the names of the model's Python files."""
    if PAIRS[recipe].model.kind != "internlm2":
        return set()
    return {f"{part}_internlm2.py" for part in ("configuration", "modeling", "tokenization")}


def build(recipe: str, folder: Path) -> tuple[Path, Path]:
    """Write the pair's two folders into this folder, and return sft's and aligned's."""
    pair = PAIRS[recipe]
    weights = {name: ("BF16", shape) for name, shape in shapes(recipe).items()}
    more = {name: ("F32", shape) for name, shape in buffers(recipe).items()}
    for name, files, tensors in (
        (pair.sft, pair.sft_files, weights | more),
        (pair.aligned, pair.aligned_files, weights),
    ):
        (folder / name).mkdir(parents=True)
        _small_files(recipe, folder / name)
        for kind, number in files:
            _weights(folder / name, kind, number, tensors)
    if recipe.startswith("zephyr"):  # a file that training has left, which has no weights
        (folder / pair.aligned / "training_args.bin").write_bytes(b"PK\x03\x04 a pickle of arguments")
    return folder / pair.sft, folder / pair.aligned


def _small_files(recipe: str, folder: Path) -> None:
    tokenizer: dict[str, Any] = {"model_max_length": 4096, "tokenizer_class": "LlamaTokenizer"}
    tokenizer["chat_template"] = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    if code_files(recipe):
        tokenizer["auto_map"] = {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}
    _write(folder / "config.json", config(recipe))
    _write(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    _write(folder / "tokenizer_config.json", tokenizer)
    _write(folder / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>"})
    _write(folder / "tokenizer.json", {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}}})
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    for name in code_files(recipe):
        (folder / name).write_text(f'"""Stands in for {name}."""\n')


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _weights(folder: Path, kind: str, number: int, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Write one file, or `number` files of about the same size and an index, with transformers' names."""
    stem, suffix, write = {
        "safetensors": ("model", "safetensors", sparse_file),
        "bin": ("pytorch_model", "bin", sparse_bin),
    }[kind]
    if number == 1:
        write(folder / f"{stem}.{suffix}", tensors)
        return
    names, sizes = list(tensors), {name: _nbytes(*tensor) for name, tensor in tensors.items()}
    total, before = sum(sizes.values()), 0
    weight_map = {}
    for name in names:
        weight_map[name] = f"{stem}-{before * number // total + 1:05}-of-{number:05}.{suffix}"
        before += sizes[name]
    for file in sorted(set(weight_map.values())):
        write(folder / file, {name: tensors[name] for name in names if weight_map[name] == file})
    _write(folder / f"{stem}.{suffix}.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    count = {"BF16": 2, "F32": 4}[dtype]
    for length in shape:
        count *= length
    return count


def sparse_bin(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Path:
    """Write the sparse file that torch.save would write for zeros; a single file contains an OrderedDict."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32}
    state: dict[str, Any] = {}
    if path.name == "pytorch_model.bin":
        state = OrderedDict()
        state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    with FakeTensorMode():
        state |= {name: torch.empty(shape, dtype=dtypes[dtype]) for name, (dtype, shape) in tensors.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(state, path)
    return path
