"""A PEFT LoRA adapter: which tensors of the checkpoint below it it changes, and by what.

An adapter folder has adapter_config.json and adapter_model.safetensors. For a module with weight W the file holds the
factors lora_A [r, in] and lora_B [out, r], and the trained weight is W + scale * B @ A, as PEFT's merge_and_unload()
computes it; modules_to_save, trained biases and saved embeddings are whole tensors. Whatever else is found, in the
config or in the file, is refused by name: nothing that was trained is dropped. Opening reads headers alone, but for
tensors of which two in the file have to be one. Source: github.com/huggingface/peft, tuners/lora/layer.py and model.py.
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ..errors import CheckpointError
from .adapter import Adapter, LowRank
from .files import ADAPTER, ADAPTER_BIN, ADAPTER_CONFIG, WHOLE_MODELS, load_json
from .model_parts import EMPTY_HINT
from .reader import ByteReader
from .renames import NameIndex, names_with_other_prefixes
from .safetensors_header import TensorInfo
from .shard import Shard
from .weight_files import open_shard

PREFIX = "base_model.model."  # PEFT's wrappers around the model
FLOATS = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
PIECE = 1 << 20  # bytes of a tensor that are compared at a time; of the widest dtype

MERGE = "merge_and_unload() it with PEFT, save_pretrained() the result and give that folder instead"
TIED_ELSEWHERE = (
    "sft ties that to other tensors and the trained model has them apart, which is not read; what PEFT merges and "
    "saves may be tied again, so give that folder instead only if its logits are the trained model's"
)
BASE = "is it the checkpoint that the adapter was trained from?"

# What makes scale * B @ A the wrong delta, or not all of it; merge_and_unload() knows how to apply it.
OTHER_KINDS = {
    "use_dora": "DoRA, which rescales the base's weights",
    "lora_bias": "biases of lora_B (PEFT merges them into layers that have a bias of their own, and into no others)",
    "trainable_token_indices": "single trained rows of an embedding",
    "target_parameters": "LoRA of parameters that are no module's weight, as of fused experts",
    "megatron_config": "LoRA of Megatron's parallel layers",
    "use_qalora": "QA-LoRA, whose lora_A takes pooled inputs",
    "use_bdlora": "BD-LoRA, whose factors are block-diagonal",
    "kasa_config": "KaSA, which truncates the base's weights",
    "monteclora_config": "MonteCLoRA, whose weights are sampled",
    "velora_config": "VeLoRA, which keeps projections beside the factors",
}
# And what no merge makes a checkpoint of that has sft's tensors.
NEVER_MERGED = {
    "alora_invocation_tokens": "an activated LoRA, which applies to some tokens only",
    "arrow_config": "Arrow, which routes between several adapters",
    "layer_replication": "layers that are copies of the base's",
}
# The rest of a config: how the training went, or read below.
KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core",
    "merge_weights", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# Values of init_lora_weights that leave the base as it was. PiSSA, OLoRA, CorDA and LoRA-GA take the initial B @ A out
# of the base's weights, and LoftQ quantises them: there the trained model is not sft + scale * B @ A, though it might
# pass for it. PEFT's own conversion of such an adapter to one over the untouched base writes `true`.
HARMLESS_INITS = {"gaussian", "eva", "orthogonal", "mica"}

_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?:(?P<linear>[AB])(\.(?P<name>[^.]+))?\.weight|"
    r"embedding_(?P<embedding>[AB])(\.(?P<embedding_name>[^.]+))?)"
)
_REFUSED_KEYS = (
    (re.compile(r"\.lora_magnitude_vector(\.|$)"), OTHER_KINDS["use_dora"]),
    (re.compile(r"\.lora_B(\.[^.]+)?\.bias$"), OTHER_KINDS["lora_bias"]),
    (re.compile(r"\.trainable_tokens_"), OTHER_KINDS["trainable_token_indices"]),
    (re.compile(r"\.lora_"), "neither lora_A nor lora_B"),
)


class _Pair(NamedTuple):
    """The factors of one module, under its name in the model that was trained."""

    module: str
    a: TensorInfo
    b: TensorInfo
    embedding: bool


class _Placed(NamedTuple):
    """A pair, the base's tensor that it changes, and whether the delta may be B @ A (False), its transpose (True)."""

    pair: _Pair
    tensor: TensorInfo
    ways: frozenset[bool]


def is_adapter(folder: str) -> bool:
    """Whether a folder is an adapter and no whole model, which may keep the config of an adapter merged into it."""
    return os.path.isfile(os.path.join(folder, ADAPTER_CONFIG)) and not any(
        os.path.exists(os.path.join(folder, name)) for name in WHOLE_MODELS
    )


def open_adapter(folder: str, base: Mapping[str, TensorInfo]) -> Adapter:
    """Read the header of an adapter and find the base's tensor for each of its own.

    Raises:
        CheckpointError: The adapter cannot be read, or is not one over this base. The message names file and tensor.
    """
    config = load_json(os.path.join(folder, ADAPTER_CONFIG))
    _check_config(os.path.join(folder, ADAPTER_CONFIG), config)
    shard = _open_weights(folder)
    pairs, others = _sort_keys(shard)
    low_rank = _low_rank(folder, shard.path, config, pairs, base)
    try:
        whole = _full(shard, config, others, base)
    finally:
        shard.reader.close()  # which keeps others from writing to the file; opened again when it is needed
    if not low_rank and not whole:
        raise CheckpointError(f"{shard.path}: neither factors nor whole tensors in it: nothing was trained")
    full = {name: tensor for name, tensor in whole.items() if name not in low_rank}
    copies = {name: tensor for name, tensor in whole.items() if name in low_rank}
    _check_saved(folder, config, full, base)
    _check_shapes(shard.path, copies, base)
    return Adapter(folder, config, shard, low_rank, full, copies)


def check_copies(adapter: Adapter, base: Mapping[str, TensorInfo], reader: Callable[[str], ByteReader]) -> None:
    """CheckpointError where a tensor that the adapter repeats of the base is not the base's, rounded to its dtype.

    PEFT saves the embedding below an embedding's LoRA, which training leaves as it is. reader gives the base's bytes of
    a tensor, by its name.
    """
    for name, copy in adapter.copies.items():
        ours = _values(adapter.shard.reader_of(copy.name), copy)
        theirs = _values(reader(name), base[name])
        for mine, other in zip(ours, theirs, strict=True):
            with np.errstate(over="ignore"):
                rounded = other.astype(mine.dtype)
            if mine.tobytes() != rounded.tobytes():
                raise CheckpointError(
                    f"{adapter.shard.path}: {copy.name!r}, the tensor below the factors, is not what sft has as "
                    f"{name!r}; {BASE}"
                )


def _check_config(path: str, config: Mapping[str, Any]) -> None:
    """Refuse every kind of adapter but a LoRA whose deltas are scale * B @ A over the untouched base."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path}: peft_type is {kind!r}, but only 'LORA' is read; {MERGE}")
    for key, what in OTHER_KINDS.items():
        if config.get(key):
            raise CheckpointError(f"{path}: {key} is {_short(config[key])}: {what}, which is not read; {MERGE}")
    for key, what in NEVER_MERGED.items():
        if config.get(key):
            raise CheckpointError(
                f"{path}: {key} is {_short(config[key])}: {what}, so no weights of sft's shapes are the trained model's"
            )
    init = config.get("init_lora_weights", True)
    if init and init is not True and str(init).lower() not in HARMLESS_INITS:
        raise CheckpointError(
            f"{path}: init_lora_weights is {_short(init)}, which may have changed the base's weights before the "
            "training, so that the adapter is not over sft; convert it (PEFT's save_pretrained(..., "
            f"path_initial_model_for_weight_conversion=...)), or {MERGE}"
        )
    _refuse_unknown(path, config)


def _refuse_unknown(path: str, config: Mapping[str, Any]) -> None:
    """A later PEFT may switch on what changes the delta, and a switch is true, or has settings of its own.

    Numbers and strings come with their defaults into every config, so they pass.
    """
    for key, value in config.items():
        known = key in KNOWN or key in OTHER_KINDS or key in NEVER_MERGED
        if not known and (value is True or (value and isinstance(value, list | dict))):
            raise CheckpointError(
                f"{path}: {key} is {_short(value)}, which is not known here and may change what the factors "
                f"mean; {MERGE}"
            )


def _open_weights(folder: str) -> Shard:
    path, pickled = os.path.join(folder, ADAPTER), os.path.join(folder, ADAPTER_BIN)
    if os.path.exists(path):
        return open_shard(path)
    if os.path.lexists(path):
        raise CheckpointError(f"{path}: a broken link; download it again")
    if not os.path.exists(pickled):
        raise CheckpointError(f"{folder}: {ADAPTER_CONFIG} is in it, but no {ADAPTER}; download it again")
    return open_shard(pickled)


def _sort_keys(shard: Shard) -> tuple[list[_Pair], list[TensorInfo]]:
    """The factors, and all tensors that are none."""
    halves: dict[tuple[str, bool, str | None], dict[str, TensorInfo]] = defaultdict(dict)
    others = []
    for tensor in shard.header.tensors:
        match = _FACTOR.fullmatch(tensor.name)
        if match is not None:
            key = (match["module"], match["embedding"] is not None, match["name"] or match["embedding_name"])
            halves[key][match["linear"] or match["embedding"]] = tensor
            continue
        for pattern, what in _REFUSED_KEYS:
            if pattern.search(tensor.name):
                raise CheckpointError(f"{shard.path}: {tensor.name!r}: {what}, which is not read; {MERGE}")
        others.append(tensor)
    pairs = [_pair(shard.path, module, embedding, found) for (module, embedding, _), found in halves.items()]
    return pairs, others


def _pair(path: str, module: str, embedding: bool, halves: Mapping[str, TensorInfo]) -> _Pair:
    if len(halves) < 2:
        half, tensor = next(iter(halves.items()))
        other = f"lora_{'embedding_' * embedding}{'AB'[half == 'A']}"
        raise CheckpointError(
            f"{path}: {tensor.name!r} is there, but {module!r} has no {other}: half a delta; download it again"
        )
    for tensor in halves.values():
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{path}: {tensor.name!r} is {tensor.dtype}, but factors are one of {', '.join(FLOATS)}; save the "
                "adapter as it was trained"
            )
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            raise CheckpointError(f"{path}: {tensor.name!r} is {list(tensor.shape)}: {_no_matrix(tensor.shape)}")
    return _Pair(module.removeprefix(PREFIX), halves["A"], halves["B"], embedding)


def _no_matrix(shape: Sequence[int]) -> str:
    if len(shape) > 2:
        return f"LoRA of a convolution, or of several matrices at once, which is not read; {MERGE}"
    return f"no matrix; {EMPTY_HINT}"


def _low_rank(
    folder: str, path: str, config: Mapping[str, Any], pairs: Sequence[_Pair], base: Mapping[str, TensorInfo]
) -> dict[str, LowRank]:
    placed = _place(path, config, pairs, base)
    scales = _Scales(os.path.join(folder, ADAPTER_CONFIG), config)
    ways: dict[str, set[bool]] = defaultdict(set)  # by the last part of the module's name; what shapes tell
    for pair, _, fits in placed.values():
        if len(fits) == 1 and not pair.embedding:
            ways[_leaf(pair)] |= fits
    found = {}
    for name, one in placed.items():
        scale = scales.of(path, one.pair)
        left, right = one.pair.b, one.pair.a
        transposed = _transposed(path, config, one, ways)
        if transposed:  # (B @ A).T = A.T @ B.T
            left, right = right, left
        found[name] = LowRank(left, right, transposed, transposed, scale)
    return found


def _place(
    path: str, config: Mapping[str, Any], pairs: Sequence[_Pair], base: Mapping[str, TensorInfo]
) -> dict[str, _Placed]:
    """Each pair by the name of the base's tensor that it changes."""
    index = _BaseNames(base)
    names = {pair.module: index.find(f"{pair.module}.weight") for pair in pairs}
    missing = [module for module, name in names.items() if name is None]
    if missing:
        raise CheckpointError(_not_in_base(path, config, missing, "module"))
    placed: dict[str, _Placed] = {}
    for pair in pairs:
        name = names[pair.module] or ""
        if name in placed:
            raise CheckpointError(
                f"{path}: {placed[name].pair.a.name!r} and {pair.a.name!r} both change sft's {name!r}: two adapters in "
                "one file; save them apart"
            )
        placed[name] = _Placed(pair, base[name], _ways(path, pair, base[name]))
    return placed


def _ways(path: str, pair: _Pair, tensor: TensorInfo) -> frozenset[bool]:
    if tensor.dtype not in FLOATS:
        raise CheckpointError(
            f"{path}: {pair.a.name!r} is a factor for sft's {tensor.name!r}, which is {tensor.dtype}, but one of "
            f"{', '.join(FLOATS)} is needed; give the base as it was before it was quantised"
        )
    plain = (pair.b.shape[0], pair.a.shape[1])
    ways = {False} if plain == tensor.shape and not pair.embedding else set()
    if plain[::-1] == tensor.shape:
        ways.add(True)
    if not ways:
        made = "its transpose" if pair.embedding else "it or its transpose"
        raise CheckpointError(
            f"{path}: {pair.b.name!r} {list(pair.b.shape)} times {pair.a.name!r} {list(pair.a.shape)} is a "
            f"{list(plain)}, but sft's {tensor.name!r} is {list(tensor.shape)}, and {made} is to be added to it; {BASE}"
        )
    return frozenset(ways)


def _transposed(path: str, config: Mapping[str, Any], one: _Placed, ways: Mapping[str, set[bool]]) -> bool:
    """Whether the delta is (B @ A).T, as for an embedding and for GPT-2's Conv1D, which is [in, out].

    The config's fan_in_fan_out says it for a square weight alone: PEFT flips it for each module of the other kind that
    it comes across, and saves the last one's. So where shapes show that there are both kinds, modules of the same name
    have to tell.
    """
    if len(one.ways) == 1:
        return next(iter(one.ways))
    said = bool(config.get("fan_in_fan_out"))
    if all(found == {said} for found in ways.values()):
        return said
    alike = ways.get(_leaf(one.pair), set())
    if len(alike) != 1:
        raise CheckpointError(
            f"{path}: {one.tensor.name!r} is square, and nothing tells whether it is stored as [in, out] or [out, in]: "
            f"fan_in_fan_out is {said}, but not for all modules; {MERGE}"
        )
    return next(iter(alike))


def _leaf(pair: _Pair) -> str:
    return pair.module.rpartition(".")[2]


class _Scales:
    """r and lora_alpha of each module: those of the first pattern that it matches, else the config's."""

    def __init__(self, path: str, config: Mapping[str, Any]) -> None:
        """path: the config's."""
        self.path = path
        self.rank = _number(path, "r", config.get("r"))
        self.alpha = _number(path, "lora_alpha", config.get("lora_alpha"))
        self.rooted = bool(config.get("use_rslora"))
        self.ranks = _patterns(path, config, "rank_pattern")
        self.alphas = _patterns(path, config, "alpha_pattern")

    def of(self, path: str, pair: _Pair) -> float:
        """The scale, after the ranks of the two factors in the file `path` are compared with the config's."""
        rank = _first_match(self.ranks, pair.module, self.rank)
        for tensor, found in ((pair.a, pair.a.shape[0]), (pair.b, pair.b.shape[1])):
            if found != rank:
                raise CheckpointError(
                    f"{path}: {tensor.name!r} {list(tensor.shape)} has the rank {found}, but {self.path} gives "
                    f"{pair.module!r} the rank {rank:g}; is it the config that was saved with the file?"
                )
        return _first_match(self.alphas, pair.module, self.alpha) / (math.sqrt(rank) if self.rooted else rank)


def _patterns(path: str, config: Mapping[str, Any], key: str) -> list[tuple[re.Pattern[str], float]]:
    """As peft.utils.other.get_pattern_key() matches: the expression is the whole name, or its end after a dot."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{path}: {key} is {_short(patterns)}, but an object is expected")
    found = []
    for pattern, value in patterns.items():
        try:
            found.append((re.compile(rf"(.*\.)?({pattern})$"), _number(path, f"{key}[{pattern!r}]", value)))
        except (re.error, RecursionError, OverflowError) as error:
            raise CheckpointError(f"{path}: {key} has {pattern!r}, which is no regular expression ({error})") from error
    return found


def _first_match(patterns: Iterable[tuple[re.Pattern[str], float]], module: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def _number(path: str, key: str, value: Any) -> float:
    """A rank, which has to be over 0, or an alpha."""
    real = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53
    rank = not key.startswith(("lora_alpha", "alpha_pattern"))
    if not real or (rank and (value < 1 or value != int(value))):
        kind = "a whole number over 0" if rank else "a number"
        raise CheckpointError(f"{path}: {key} is {_short(value)}, but {kind} is expected")
    return float(value)


def _full(
    shard: Shard, config: Mapping[str, Any], others: Sequence[TensorInfo], base: Mapping[str, TensorInfo]
) -> dict[str, TensorInfo]:
    """Whole tensors by the base's names, those that lie below factors too."""
    index = _BaseNames(base)
    found: dict[str, TensorInfo] = {}
    missing = []
    for tensor in others:
        key = tensor.name.removeprefix(PREFIX)
        if ".original_module." in key:  # the base's, which one of modules_to_save stands in for
            continue
        name = next(filter(None, map(index.find, names_without_wrappers(tensor.name))), None)
        if name is None:
            missing.append(tensor)
        elif name not in found:
            found[name] = tensor
        elif not _equal(shard, found[name], tensor):  # PEFT may save one of modules_to_save as an embedding again
            raise CheckpointError(
                f"{shard.path}: {found[name].name!r} and {tensor.name!r} both stand for sft's {name!r}, and "
                f"differ; {MERGE}"
            )
    unknown = [tensor.name for tensor in missing if not _tied(shard, tensor, found.values())]
    if unknown:
        raise CheckpointError(_not_in_base(shard.path, config, unknown, "tensor"))
    return found


def names_without_wrappers(name: str) -> Iterator[str]:
    """Yield the names that a tensor of the file may have in the model: without PEFT's wrappers and adapter's name."""
    key = name.removeprefix(PREFIX)
    yield key
    for wrapper in (r"\.base_layer", r"\.modules_to_save", r"\.modules_to_save\.[^.]+"):
        yield re.sub(rf"{wrapper}(?=\.)", "", key, count=1)


def _tied(shard: Shard, tensor: TensorInfo, found: Iterable[TensorInfo]) -> bool:
    """Whether it is another name for a matrix that is found: PEFT saves a head that is tied to the embedding twice."""
    return len(tensor.shape) == 2 and any(_equal(shard, tensor, other) for other in found)


def _equal(shard: Shard, one: TensorInfo, other: TensorInfo) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    pieces = zip(_pieces(shard, one), _pieces(shard, other), strict=True)
    return all(a == b for a, b in pieces)


def holds_equal(shard: Shard, one: TensorInfo | LowRank, other: TensorInfo | LowRank) -> bool:
    """Return True if two whole tensors of the file, or two deltas by their factors, are the same numbers."""
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        sides = zip(_factors(shard, one), _factors(shard, other), strict=True)
        return one.scale == other.scale and all(np.array_equal(a, b) for a, b in sides)
    assert isinstance(one, TensorInfo)
    assert isinstance(other, TensorInfo)
    return _equal(shard, one, other)


def _factors(shard: Shard, delta: LowRank) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the left factor [M, r] and the right one [r, N]."""
    for tensor, transposed in ((delta.left, delta.left_transposed), (delta.right, delta.right_transposed)):
        data = bytearray(tensor.nbytes)
        shard.reader_of(tensor.name).read(tensor.start, data)
        matrix = np.frombuffer(data, FLOATS[tensor.dtype]).reshape(tensor.shape)
        yield matrix.T if transposed else matrix


def _pieces(shard: Shard, tensor: TensorInfo) -> Iterator[bytearray]:
    return _read(shard.reader_of(tensor.name), tensor, PIECE)


def _read(reader: ByteReader, tensor: TensorInfo, size: int) -> Iterator[bytearray]:
    """A tensor's bytes, `size` at a time."""
    for start in range(tensor.start, tensor.stop, size):
        piece = bytearray(min(size, tensor.stop - start))
        reader.read(start, piece)
        yield piece


def _values(reader: ByteReader, tensor: TensorInfo) -> Iterator[np.ndarray[Any, Any]]:
    """A tensor's elements, as many at a time as of any other dtype."""
    dtype = np.dtype(FLOATS[tensor.dtype])
    for piece in _read(reader, tensor, PIECE // 8 * dtype.itemsize):
        yield np.frombuffer(piece, dtype)


def _names_in_base(name: str) -> Iterator[str]:
    """Yield the names that a tensor of the trained model may have in the base, the likeliest first."""
    yield name
    yield from names_with_other_prefixes(name)
    if name.startswith("model."):  # the language model alone was trained
        yield f"language_model.{name}"


class _BaseNames:
    """The base's names, found by the names that the trained model had."""

    def __init__(self, base: Mapping[str, TensorInfo]) -> None:
        self._base = base
        self._index: NameIndex | None = None

    def find(self, name: str) -> str | None:
        """Return the base's name for a tensor of the model that was trained; None where it has none, or two."""
        found = next((each for each in _names_in_base(name) if each in self._base), None)
        if found is not None:
            return found
        self._index = self._index or NameIndex(self._base)
        fits = self._index.find(name)
        return fits.pop() if len(fits) == 1 else None


def _not_in_base(path: str, config: Mapping[str, Any], names: Sequence[str], kind: str) -> str:
    trained = config.get("base_model_name_or_path")
    over = f" (its config says {_short(trained)})" if trained else ""
    count = f"{len(names)} {kind}{'s' * (len(names) > 1)}"
    hint = ""
    if any(re.search(r"(^|\.)(lm_head|embed_out)(\.|$)", name) for name in names):
        hint = f"; if it is a head that sft ties to its embedding: {TIED_ELSEWHERE}"
    return (
        f"{path}: {count} of the adapter that sft does not have: {_some(names)}; is sft the checkpoint that the "
        f"adapter was trained from{over}?{hint}"
    )


def _check_saved(
    folder: str, config: Mapping[str, Any], full: Mapping[str, TensorInfo], base: Mapping[str, Any]
) -> None:
    """Every one of modules_to_save that the base has is in the file: PEFT would not load it otherwise."""
    modules = config.get("modules_to_save") or []
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise CheckpointError(
            f"{os.path.join(folder, ADAPTER_CONFIG)}: modules_to_save is {_short(modules)}, not a list of names"
        )
    for module in modules:  # PEFT lists heads that a model may not have
        if any(f".{module}." in f".{name}" for name in base) and not any(f"{module}." in name for name in full):
            raise CheckpointError(
                f"{folder}: modules_to_save has {module!r}, which sft has too, but no tensor of it was saved; download "
                "it again"
            )


def _check_shapes(path: str, copies: Mapping[str, TensorInfo], base: Mapping[str, TensorInfo]) -> None:
    for name, copy in copies.items():
        if copy.shape != base[name].shape or copy.dtype not in FLOATS:
            raise CheckpointError(
                f"{path}: {copy.name!r}, the tensor below the factors, is {copy.dtype} {list(copy.shape)}, but sft's "
                f"{name!r} is {base[name].dtype} {list(base[name].shape)}; {BASE}"
            )


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _short(value: Any, most: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."
