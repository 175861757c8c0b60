"""The pairs of all recipes as on the hub, but without data: their names, shapes, dtypes and kinds of file.

The files are sparse, so a pair of 70B takes a megabyte of disk and reads as zeros. The sizes are those of the public
configs. The kinds and numbers of files are those of the repositories. For the repositories in `CHOSEN` they are not
known, so the usual ones of the model's maker and size are used. `CONFIGS` says which public config gives the sizes of
a pair outside the paper.
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
    """The sizes of an architecture.

    Attributes:
        heads: The number of heads for queries.
        kv: The number of heads for keys and values.
        head_dim: The size of a head; 0 if it is `hidden` divided by `heads`.
        experts: The number of experts of a layer; 0 for a layer with one MLP.
    """

    kind: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv: int
    vocabulary: int
    head_dim: int = 0
    experts: int = 0

    @property
    def head(self) -> int:
        return self.head_dim or self.hidden // self.heads


class Pair(NamedTuple):
    """One pair.

    Attributes:
        params_b: The published number of parameters in billions; for a pair outside the paper the one in its name.
    """

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
TULU3_8B = LLAMA3_8B._replace(vocabulary=128264)
TULU3_70B = Model("llama", 8192, 28672, 80, 64, 8, 128264)
OLMO2_7B = Model("olmo2", 4096, 11008, 32, 32, 32, 100352)
OLMO2_32B = Model("olmo2", 5120, 27648, 64, 40, 8, 100352)
OLMO3_7B = Model("olmo3", 4096, 11008, 32, 32, 32, 100278)
OLMOE_7B = Model("olmoe", 2048, 1024, 16, 16, 16, 50304, experts=64)
GEMMA2_9B = Model("gemma2", 3584, 14336, 42, 16, 8, 256000, head_dim=256)
QWEN25_7B = Model("qwen2", 3584, 18944, 28, 28, 4, 152064)


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

_SFT_FULL = ("zephyr-7b-sft-full", "safetensors 3")
MORE_PAIRS = {
    "zephyr-7b-dpo-full": _pair(MISTRAL, 7, *_SFT_FULL, "zephyr-7b-dpo-full", "safetensors 3"),
    "zephyr-5pct": _pair(MISTRAL, 7, *_SFT_FULL, "zephyr_0.05", "safetensors 3"),
    "zephyr-10pct": _pair(MISTRAL, 7, *_SFT_FULL, "zephyr_0.1", "safetensors 3"),
    "zephyr-20pct": _pair(MISTRAL, 7, *_SFT_FULL, "zephyr_0.2", "safetensors 3"),
    "zephyr-40pct": _pair(MISTRAL, 7, *_SFT_FULL, "zephyr_0.4", "safetensors 3"),
    "mistral-7b-sppo": _pair(
        MISTRAL, 7, "Mistral-7B-Instruct-v0.2", "safetensors 3, bin 3", "Mistral7B-PairRM-SPPO", "safetensors 3"
    ),
    "llama-3-8b-simpo": _pair(
        LLAMA3_8B, 8, "Meta-Llama-3-8B-Instruct", "safetensors 4", "Llama-3-Instruct-8B-SimPO", "safetensors 4"
    ),
    "tulu-3-8b-dpo": _pair(
        TULU3_8B, 8, "Llama-3.1-Tulu-3-8B-SFT", "safetensors 4", "Llama-3.1-Tulu-3-8B-DPO", "safetensors 4"
    ),
    "tulu-3-70b-dpo": _pair(
        TULU3_70B, 70, "Llama-3.1-Tulu-3-70B-SFT", "safetensors 30", "Llama-3.1-Tulu-3-70B-DPO", "safetensors 30"
    ),
    "olmo-2-7b-dpo": _pair(OLMO2_7B, 7, "OLMo-2-1124-7B-SFT", "safetensors 3", "OLMo-2-1124-7B-DPO", "safetensors 3"),
    "olmo-2-32b-dpo": _pair(
        OLMO2_32B, 32, "OLMo-2-0325-32B-SFT", "safetensors 14", "OLMo-2-0325-32B-DPO", "safetensors 14"
    ),
    "olmo-3-7b-dpo": _pair(
        OLMO3_7B, 7, "Olmo-3-7B-Instruct-SFT", "safetensors 3", "Olmo-3-7B-Instruct-DPO", "safetensors 3"
    ),
    "olmoe-1b-7b": _pair(
        OLMOE_7B, 7, "OLMoE-1B-7B-0924-SFT", "safetensors 3", "OLMoE-1B-7B-0924-Instruct", "safetensors 3"
    ),
    "gemma-2-9b-simpo": _pair(GEMMA2_9B, 9, "gemma-2-9b-it", "safetensors 4", "gemma-2-9b-it-SimPO", "safetensors 4"),
    "eurus-2-7b-prime": _pair(QWEN25_7B, 7, "Eurus-2-7B-SFT", "safetensors 4", "Eurus-2-7B-PRIME", "safetensors 7"),
}
ALL_PAIRS = {**PAIRS, **MORE_PAIRS}
# aligned's dtype, where it is not that of sft: seven files of less than 5 GB have four bytes for each parameter.
ALIGNED_DTYPES = {"eurus-2-7b-prime": "F32"}

# The public config of each architecture outside the paper, and the part of the sizes that no config confirms.
CONFIGS = {
    "olmo2": "allenai/OLMo-2-1124-7B-Instruct, allenai/OLMo-2-0325-32B",
    "olmo3": "sizes: olmo3_7B in allenai/OLMo-core; vocabulary: hf-tiny-v2/tiny-random-Olmo3Model, whose tokenizer has "
    "100278 tokens; the config of the repository itself was not found",
    "olmoe": "allenai/OLMoE-1B-7B-0924-SFT",
    "gemma2": "prithivMLmods/GWQ-9B-Preview, a model of the same size that was trained from gemma-2-9b-it",
    "qwen2": "PRIME-RL/Eurus-2-7B-SFT",
    "mistral": "UCLA-AGI/Mistral7B-PairRM-SPPO",
    "llama": "allenai/Llama-3.1-Tulu-3-8B; the vocabulary of 70B is taken to be that of 8B",
}

# The properties that are not known: the kind of the files, or else their number.
CHOSEN = {
    "zephyr-7b-alpha": "sft: kind (likely bin) and number; aligned: numbers",
    "zephyr-7b-beta": "aligned: numbers",
    "snorkel-mistral-pairrm": "sft: kinds and numbers; aligned: number (one file, with a pickled OrderedDict)",
    "internlm2-chat-1.8b": "aligned: kind and number",
    "internlm2-chat-20b": "both: kind and number",
    "tulu-2-dpo-13b": "both: number of .bin files",
    **dict.fromkeys(MORE_PAIRS, "both: kind and number"),
    "eurus-2-7b-prime": "sft: kind and number; aligned: dtype",
}


@cache
def shapes(recipe: str) -> Shapes:
    """Return the shapes of the parameters by name, in the model's order; sft and aligned have the same."""
    model = ALL_PAIRS[recipe].model
    return _internlm2(model) if model.kind == "internlm2" else _decoder(model)


def buffers(recipe: str) -> Shapes:
    """Return the fp32 buffers that only sft has: old versions of transformers saved Llama's rotary frequencies."""
    if recipe != "tulu-2-dpo-7b":
        return {}
    model = ALL_PAIRS[recipe].model
    return {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (model.head // 2,) for i in range(model.layers)}


NORMS = {  # the norms of a layer behind its attention and its MLP, in the order of transformers
    "olmo2": ("post_attention", "post_feedforward"),
    "olmo3": ("post_attention", "post_feedforward"),
    "gemma2": ("input", "post_attention", "pre_feedforward", "post_feedforward"),
}


def _decoder(model: Model) -> Shapes:
    """Return the shapes of a Llama, or of a model whose layers differ from a Llama's in norms, biases or experts."""
    hidden = model.hidden
    parts = _attention(model) | _mlp(model)
    parts |= {f"{name}_layernorm.weight": (hidden,) for name in NORMS.get(model.kind, ("input", "post_attention"))}
    head = {} if model.kind == "gemma2" else {"lm_head.weight": (model.vocabulary, hidden)}
    return {
        "model.embed_tokens.weight": (model.vocabulary, hidden),
        **{f"model.layers.{i}.{name}": shape for i in range(model.layers) for name, shape in parts.items()},
        "model.norm.weight": (hidden,),
        **head,
    }


def _attention(model: Model) -> Shapes:
    """Return the shapes of a layer's attention, by the names in the layer."""
    hidden, queries, keys = model.hidden, model.heads * model.head, model.kv * model.head
    found: Shapes = {}
    for name, rows in (("q", queries), ("k", keys), ("v", keys)):
        found[f"self_attn.{name}_proj.weight"] = (rows, hidden)
        if model.kind == "qwen2":
            found[f"self_attn.{name}_proj.bias"] = (rows,)
    found["self_attn.o_proj.weight"] = (hidden, queries)
    if model.kind in ("olmo2", "olmo3", "olmoe"):
        found |= {"self_attn.q_norm.weight": (queries,), "self_attn.k_norm.weight": (keys,)}
    return found


def _mlp(model: Model) -> Shapes:
    """Return the shapes of a layer's MLP or of its router and experts, by the names in the layer."""
    hidden, inner = model.hidden, model.inner
    one = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    if not model.experts:
        return {f"mlp.{name}.weight": shape for name, shape in one.items()}
    router = {"mlp.gate.weight": (model.experts, hidden)}
    experts = range(model.experts)
    return router | {f"mlp.experts.{i}.{name}.weight": shape for i in experts for name, shape in one.items()}


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
    model = ALL_PAIRS[recipe].model
    classes = {
        "mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM", "internlm2": "InternLM2ForCausalLM",
        "olmo2": "Olmo2ForCausalLM", "olmo3": "Olmo3ForCausalLM", "olmoe": "OlmoeForCausalLM",
        "gemma2": "Gemma2ForCausalLM", "qwen2": "Qwen2ForCausalLM",
    }  # fmt: skip
    found: dict[str, Any] = {
        "architectures": [classes[model.kind]],
        "model_type": model.kind,
        "hidden_size": model.hidden,
        "intermediate_size": model.inner,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv,
        "vocab_size": model.vocabulary,
        "tie_word_embeddings": model.kind == "gemma2",
        "torch_dtype": "bfloat16",
    }
    if model.head_dim:
        found["head_dim"] = model.head_dim
    if model.experts:
        found["num_experts"] = model.experts
    if model.kind == "internlm2":
        causal = "modeling_internlm2.InternLM2ForCausalLM"
        code = {"AutoConfig": "configuration_internlm2.InternLM2Config", "AutoModelForCausalLM": causal}
        found["auto_map"] = code | {"AutoModel": causal}
    return found


def code_files(recipe: str) -> set[str]:
    """Return the names of the model's Python files."""
    if ALL_PAIRS[recipe].model.kind != "internlm2":
        return set()
    return {f"{part}_internlm2.py" for part in ("configuration", "modeling", "tokenization")}


def build(recipe: str, folder: Path) -> tuple[Path, Path]:
    """Write the pair's two folders into this folder, and return sft's and aligned's."""
    pair = ALL_PAIRS[recipe]
    weights = {name: ("BF16", shape) for name, shape in shapes(recipe).items()}
    trained = {name: (ALIGNED_DTYPES.get(recipe, "BF16"), shape) for name, shape in shapes(recipe).items()}
    more = {name: ("F32", shape) for name, shape in buffers(recipe).items()}
    for name, files, tensors in (
        (pair.sft, pair.sft_files, weights | more),
        (pair.aligned, pair.aligned_files, trained),
    ):
        (folder / name).mkdir(parents=True)
        _small_files(recipe, folder / name)
        for kind, number in files:
            _weights(folder / name, kind, number, tensors)
    if recipe in PAIRS and recipe.startswith("zephyr"):  # a file that training has left, which has no weights
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
