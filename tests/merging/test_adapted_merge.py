"""Merges with a PEFT adapter as aligned, file to file: the bits of the documented formula and of PEFT's merge."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import contents, fingerprint, quiet, read_file, read_folder, safetensors_bytes, staging_folder
from interrupting import Stop, interrupted
from plans import make_plan

import expo
from expo.checkpoints.adapter import LowRank
from expo.execution.engines import choose
from expo.execution.tensor_source import MOST_FACTORS, TensorSource
from expo.fast import main
from expo.inputs.resolve import open_inputs
from expo.kernels import convert

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
PREFIX = "base_model.model."
KINDS = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
TOKENS, MORE_TOKENS = 211, 216
LLAMA = {
    "vocab_size": TOKENS, "hidden_size": 48, "intermediate_size": 104, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {
    "vocab_size": TOKENS, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 16, "bos_token_id": 0,
    "eos_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
PATTERNS = {
    "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.k_proj": 5},
    "alpha_pattern": {"self_attn.[qk]_proj": 3, "0.mlp.down_proj": 32},
}


@dataclass(frozen=True)
class Kind:
    """A kind of adapter: the base's dtype, arguments of LoraConfig and save_pretrained, options of the merge."""

    dtype: str
    config: dict[str, Any]
    family: str = "llama"
    save: dict[str, Any] = field(default_factory=dict)
    tokens: int = TOKENS
    merge: dict[str, Any] = field(default_factory=dict)
    factors_as_base: bool = False


CASES = {
    "LoRA": Kind("BF16", {"target_modules": "all-linear", "r": 8, "lora_alpha": 20}),
    "LoRA over fp16": Kind("F16", {"target_modules": "all-linear", "r": 3, "use_rslora": True}),
    "LoRA over fp32": Kind("F32", {"target_modules": ["q_proj", "up_proj"], "r": 64}),
    "factors of bf16": Kind("BF16", {"target_modules": ["q_proj", "down_proj"], "r": 4}, factors_as_base=True),
    "rsLoRA, patterns": Kind("BF16", {"target_modules": "all-linear", "use_rslora": True, **PATTERNS}),
    "lm_head": Kind("BF16", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"], "bias": "all"}),
    "embedding": Kind("BF16", {"target_modules": ["embed_tokens", "q_proj"], "r": 6}),
    "resized": Kind(
        "BF16",
        {"target_modules": ["v_proj", "gate_proj"]},
        save={"save_embedding_layers": True},
        tokens=MORE_TOKENS,
        merge={"on_mismatch": "rows"},
    ),
    "GPT-2": Kind("BF16", {"target_modules": ["c_attn", "c_proj", "c_fc"]}, "gpt2"),
    "GPT-2 over fp32": Kind("F32", {"target_modules": ["wte", "c_fc", "c_proj", "lm_head"], "r": 5}, "gpt2"),
}


class Made(NamedTuple):
    """A base and an adapter in their folders, the scale of each module, and PEFT's own merge in fp32."""

    kind: Kind
    base: Path
    adapter: Path
    scales: dict[str, float]
    peft: dict[str, Any]

    @property
    def pair(self) -> tuple[Path, Path]:
        return self.base, self.adapter


def tokenizer(size: int, template: str) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    model = Tokenizer(WordLevel({f"t{i}": i for i in range(size)}, unk_token="t0"))
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="t0")
    wrapped.chat_template = template
    return wrapped


def new_model(family: str) -> Any:
    torch.manual_seed(7)
    if family == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


def train(wrapped: Any, also: tuple[str, ...]) -> None:
    """Change every trainable parameter, and every parameter with one of `also` in its name."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad or any(part in name for part in also):
                parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.05).to(parameter.dtype))


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Made]]:
    place = tmp_path_factory.mktemp("adapters")

    @cache
    def make(name: str) -> Made:
        kind = CASES[name]
        base, folder = place / name / "base", place / name / "adapter"
        with quiet():
            model = new_model(kind.family).to(TORCH[kind.dtype])
            model.save_pretrained(base, max_shard_size="60KB" if name == "LoRA" else "1GB")
            tokenizer(TOKENS, "base's").save_pretrained(base)
            model = model if kind.factors_as_base else model.float()
            if kind.tokens != TOKENS:
                model.resize_token_embeddings(kind.tokens)
            config = peft.LoraConfig(**kind.config)
            wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=not kind.factors_as_base)
            resized = kind.tokens != TOKENS
            train(wrapped, ("embed_tokens", "lm_head") if resized else ())
            wrapped.save_pretrained(folder, **kind.save)
            if resized:
                tokenizer(kind.tokens, "adapter's").save_pretrained(folder)
            scales = {
                key.removeprefix(PREFIX): float(module.scaling["default"])
                for key, module in wrapped.named_modules()
                if isinstance(getattr(module, "scaling", None), dict)
            }
            merged = wrapped.float().merge_and_unload().state_dict()
        return Made(kind, base, folder, scales, {key: value.numpy() for key, value in merged.items()})

    yield make
    for name in CASES:
        assert not list(place.rglob("*.expo-staging")), name


@pytest.fixture(params=CASES)
def made(request: pytest.FixtureRequest, make: Callable[[str], Made]) -> Iterator[Made]:
    adapter = make(request.param)
    before = fingerprint(*adapter.pair)
    yield adapter
    assert fingerprint(*adapter.pair) == before


@pytest.fixture
def lora(make: Callable[[str], Made]) -> Made:
    return make("LoRA")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make chunks so small that most of them begin and end inside a row."""
    monkeypatch.setattr("expo.execution.worker_pool.CHUNK", 4096)
    monkeypatch.setattr("expo.tensors.streaming.CHUNK", 1000)
    monkeypatch.setattr("expo.execution.tensor_source.CONVERTED_ELEMENTS", 333)


# The expected tensors, from the files' bytes and the documents alone


def array(tensor: tuple[str, tuple[int, ...], bytes]) -> Any:
    """Return a tensor as fp32."""
    dtype, shape, data = tensor
    return np.frombuffer(data, KINDS[dtype]).astype(np.float32).reshape(shape)


def deltas(made: Made) -> dict[str, Any]:
    """Return scale * left @ right in fp32, summed from the left, by the base's names."""
    stored = read_file(made.adapter / "adapter_model.safetensors")
    products = {}
    for module, scale in made.scales.items():
        embedding = f"{PREFIX}{module}.lora_embedding_A" in stored
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        right, left = (array(stored[f"{PREFIX}{module}.{name}"]) for name in names)
        if embedding or (made.kind.family == "gpt2" and "lm_head" not in module):  # the weight has the shape [in, out]
            left, right = right.T, left.T
        delta = np.zeros((left.shape[0], right.shape[1]), np.float32)
        for k in range(left.shape[1]):
            delta += left[:, k, None] * right[None, k, :]
        products[f"{module}.weight"] = delta * np.float32(scale)
    return products


def full(made: Made) -> Tensors:
    """Return the adapter's whole tensors by the base's names, without an embedding that has factors too."""
    stored = read_file(made.adapter / "adapter_model.safetensors")
    whole = {key: tensor for key, tensor in stored.items() if "lora_" not in key}
    named = {key.removeprefix(PREFIX).replace(".base_layer.", "."): tensor for key, tensor in whole.items()}
    return {
        name: tensor for name, tensor in named.items() if name.rpartition(".")[0] not in made.scales or "bias" in name
    }


def expected(made: Made, alpha: float, dtype: str = "", own: dict[str, float] | None = None) -> Tensors:
    """Return every tensor of the output; `own` has the alphas of single tensors."""
    products, whole, tensors = deltas(made), full(made), {}
    for name, tensor in read_folder(made.base).items():
        target = dtype or tensor[0]
        base, al = array(tensor), (own or {}).get(name, alpha)
        if name in products:
            value = base + np.float32(1 + al) * products[name]
        elif name in whole:
            value = array(whole[name]).copy()
            rows = len(base)
            value[:rows] = value[:rows] + np.float32(al) * (value[:rows] - base)
        else:
            value = base
        assert value.dtype == np.float32
        tensors[name] = (target, value.shape, value.astype(KINDS[target]).tobytes())
    return tensors


def assert_equal(actual: Tensors, expected_tensors: Tensors) -> None:
    assert {name: tensor[:2] for name, tensor in actual.items()} == {
        name: t[:2] for name, t in expected_tensors.items()
    }
    assert [name for name in expected_tensors if actual[name] != expected_tensors[name]] == []


def merge(made: Made, alpha: Any, out: Path, **options: Any) -> Tensors:
    expo.merge(*made.pair, alpha, out, **made.kind.merge, **options)
    return read_folder(out)


def files(folder: Path) -> dict[str, bytes]:
    """Return the digests of the files, without the card, which contains the path of the adapter."""
    return {name: digest for name, digest in contents(folder).items() if name != "README.md"}


# The bits


@pytest.mark.parametrize("alpha", [0.3, 0.0, -0.5])
def test_every_tensor_is_what_the_documents_say(made: Made, tmp_path: Path, alpha: float) -> None:
    found = merge(made, alpha, tmp_path / "out")
    assert_equal(found, expected(made, alpha))
    base, changed = read_folder(made.base), {*deltas(made), *full(made)}
    assert changed < set(base)
    for name in base.keys() - changed:
        assert found[name] == base[name]
    for name in changed - base.keys() | {name for name in changed if found[name] == base[name]}:
        pytest.fail(f"{name} is the base's")


def test_what_the_cases_are_about(make: Callable[[str], Made]) -> None:
    """Each case has the property that it was made for."""
    ranks = {name: one.config.get("r", 8) for name, one in CASES.items()}
    assert set(make("lm_head").adapter.iterdir()) > {make("lm_head").adapter / "adapter_config.json"}
    assert {"lm_head.weight", "model.norm.weight"} < set(full(make("lm_head")))
    assert "model.layers.1.self_attn.k_proj.bias" in full(make("lm_head"))
    assert set(full(make("resized"))) == {"lm_head.weight", "model.embed_tokens.weight"}
    assert {shape[0] for _, shape, _ in full(make("resized")).values()} == {MORE_TOKENS}
    assert "model.embed_tokens.weight" in deltas(make("embedding"))
    assert "transformer.wte.weight" in deltas(make("GPT-2 over fp32"))
    stored = read_file(make("factors of bf16").adapter / "adapter_model.safetensors")
    assert {dtype for dtype, _, _ in stored.values()} == {"BF16"}
    assert len(set(make("rsLoRA, patterns").scales.values())) == 5
    assert len(list(make("LoRA").base.glob("model-*.safetensors"))) > 2
    assert len(deltas(make("LoRA"))) > MOST_FACTORS < ranks["LoRA over fp32"]


def test_alpha_0_is_what_peft_merges(made: Made, tmp_path: Path) -> None:
    """The rounded values are PEFT's, except for rare differences of one place, because PEFT sums in another order."""
    found = merge(made, 0, tmp_path / "out")
    same = total = 0
    for name, (dtype, shape, data) in found.items():
        theirs = made.peft[name]
        assert theirs.shape == shape
        rounded = theirs.astype(KINDS[dtype])
        ours = np.frombuffer(data, KINDS[dtype]).reshape(shape)
        near = np.abs(ours.astype(np.float64) - theirs) <= 1e-6 * np.abs(theirs).max()
        if dtype != "F32":
            near |= np.abs(ordered(ours) - ordered(rounded)) <= 1
            same, total = same + int((ours == rounded).sum()), total + ours.size
        assert near.all(), name
        if name not in deltas(made):
            assert (ours == rounded).all(), name
    assert same >= 0.999 * total


def ordered(x: Any) -> Any:
    """Return whole numbers that count the values of a 16-bit format, from the least to the largest."""
    bits = x.view(np.int16).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFF), bits)


@pytest.mark.parametrize("alpha", [0.3, 0.0])
def test_stream_gives_the_same(made: Made, small_chunks: None, alpha: float) -> None:
    wanted = expected(made, alpha)
    names = {np.dtype(kind): dtype for dtype, kind in KINDS.items()}
    resized = made.kind.tokens != TOKENS
    with pytest.warns(UserWarning, match="the tokenizers differ") if resized else contextlib.nullcontext():
        arrays = expo.stream(*made.pair, alpha, framework="numpy", **made.kind.merge)
    assert_equal({name: (names[x.dtype], x.shape, x.tobytes()) for name, x in arrays}, wanted)


def test_stream_of_torch_tensors(lora: Made) -> None:
    wanted = expected(lora, 0.3)
    for name, tensor in expo.stream(*lora.pair, 0.3):
        assert tensor.dtype == torch.bfloat16
        assert tensor.view(torch.int16).numpy().tobytes() == wanted.pop(name)[2]
    assert not wanted


@pytest.mark.parametrize("engine", ["cpu", "numpy"])
def test_engines_and_chunks_do_not_show(made: Made, tmp_path: Path, small_chunks: None, engine: str) -> None:
    if engine == "cpu" and convert._cpu is None:
        pytest.skip("the compiled engine is not built")
    with pytest.MonkeyPatch.context() as patch:
        if engine == "numpy":
            patch.setattr(convert, "_cpu", None)
        assert_equal(merge(made, 0.3, tmp_path / "out", engine=engine, verify=True), expected(made, 0.3))


def test_several_alphas_in_one_pass(made: Made, tmp_path: Path, small_chunks: None) -> None:
    alphas = (0.3, 0.0, 1.0)
    result = expo.merge(*made.pair, alphas, tmp_path / "at-{alpha}", verify=True, **made.kind.merge)
    for output, alpha in zip(result.outputs, alphas, strict=True):
        assert_equal(read_folder(Path(output.path)), expected(made, alpha))
        single = expo.merge(*made.pair, alpha, tmp_path / "single" / f"at-{alpha:g}", **made.kind.merge)
        assert files(Path(single.outputs[0].path)) == files(Path(output.path))
        assert single.outputs[0].relative_change == output.relative_change
        assert single.outputs[0].changed == output.changed


def test_the_card_of_alpha_0_is_the_same_in_a_sweep(lora: Made, tmp_path: Path) -> None:
    expo.merge(*lora.pair, (0.3, 0.0), tmp_path / "at-{alpha}")
    expo.merge(*lora.pair, 0, tmp_path / "alone")
    assert contents(tmp_path / "at-0") == contents(tmp_path / "alone")


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_another_dtype_is_rounded_once(made: Made, tmp_path: Path, dtype: str) -> None:
    target = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}[dtype]
    found = merge(made, 0.3, tmp_path / "out", dtype=dtype)
    assert_equal(found, expected(made, 0.3, target))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype]


def test_alpha_for(made: Made, tmp_path: Path) -> None:
    """Alpha 0 keeps the adapter's tensor and not the base's."""
    name, other = list(deltas(made))[:2]
    rules = {name.replace(".", r"\."): 0.0, other.replace(".", r"\."): 2.0}
    whole = dict.fromkeys(full(made), 0.5)
    rules |= {key.replace(".", r"\."): value for key, value in whole.items()}
    found = merge(made, 0.3, tmp_path / "out", alpha_for=rules)
    assert_equal(found, expected(made, 0.3, own={name: 0.0, other: 2.0, **whole}))
    assert found[name] == expected(made, 0)[name] != read_folder(made.base)[name]


def test_alpha_minus_1_is_the_base(lora: Made, tmp_path: Path) -> None:
    for name, tensor in merge(lora, -1, tmp_path / "out").items():
        np.testing.assert_array_equal(array(tensor), array(read_folder(lora.base)[name]))


def test_an_alpha_that_is_not_plain_in_fp32(lora: Made, tmp_path: Path) -> None:
    """The sum 1 + alpha is rounded to fp32 once; fp32(0.1) + 1 would be rounded twice."""
    alpha = next(x for x in np.linspace(0.1, 0.2, 999).tolist() if np.float32(1 + x) != 1 + np.float32(x))
    assert_equal(merge(lora, alpha, tmp_path / "out"), expected(lora, alpha))


# Interrupted merges


@pytest.mark.parametrize("chunks", [0, 7, 20])
def test_a_merge_that_is_resumed(
    lora: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_chunks: None, chunks: int
) -> None:
    monkeypatch.setattr("expo.output.journal.INTERVAL", 0.0)
    monkeypatch.setattr("expo.execution.worker_pool.TICK", 0.001)
    out, plain = tmp_path / "out", expo.merge(*lora.pair, 0.3, tmp_path / "plain")
    interrupted(monkeypatch, chunks, Stop(), lambda: expo.merge(*lora.pair, 0.3, out))
    assert staging_folder(out).exists()
    resumed = expo.merge(*lora.pair, 0.3, out, resume=True, verify=True)
    assert (resumed.resumed > 0) is (chunks > 0)
    assert contents(out) == contents(tmp_path / "plain")
    for key in ("relative_distance", "max_abs_difference", "extrapolated", "copied"):
        assert getattr(resumed, key) == getattr(plain, key)
    assert resumed.outputs[0].changed == plain.outputs[0].changed


def test_another_adapter_is_not_resumed_with(
    lora: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_chunks: None
) -> None:
    adapter = shutil.copytree(lora.adapter, tmp_path / "adapter")
    weights = adapter / "adapter_model.safetensors"
    interrupted(monkeypatch, 3, Stop(), lambda: expo.merge(lora.base, adapter, 0.3, tmp_path / "out"))
    os.utime(weights, (1, 1))
    with pytest.raises(expo.OutputError, match=r"\(aligned: another size, time of change or header of adapter_model"):
        expo.merge(lora.base, adapter, 0.3, tmp_path / "out", resume=True)


def test_another_scale_is_not_resumed_with(
    lora: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_chunks: None
) -> None:
    adapter = shutil.copytree(lora.adapter, tmp_path / "adapter")
    interrupted(monkeypatch, 3, Stop(), lambda: expo.merge(lora.base, adapter, 0.3, tmp_path / "out"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 5}))
    with pytest.raises(expo.OutputError, match="holds another merge"):
        expo.merge(lora.base, adapter, 0.3, tmp_path / "out", resume=True)


# The files


def test_the_base_s_files_and_nothing_of_the_adapter_s(lora: Made, tmp_path: Path) -> None:
    expo.merge(*lora.pair, 0.3, tmp_path / "out")
    base, out = contents(lora.base), contents(tmp_path / "out")
    assert out.keys() == {*base, "README.md"}
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert out[name] == base[name]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((lora.base / "model.safetensors.index.json").read_text())["weight_map"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "aligned: `adapter`" in card
    assert "sft: `base`" in card
    assert "- adapter\n- base\n" in card


def test_the_adapter_s_tokenizer_wins(make: Callable[[str], Made], tmp_path: Path) -> None:
    made = make("resized")
    result = expo.merge(*made.pair, 0.3, tmp_path / "out", **made.kind.merge)
    assert any("5 in aligned alone, the first of them 211 't211'" in warning for warning in result.warnings)
    theirs, out = contents(made.adapter), contents(tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert out[name] == theirs[name]
    with quiet():
        found = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(found) == MORE_TOKENS
    assert found.chat_template == "adapter's"


def test_a_tokenizer_is_replaced_as_a_whole(make: Callable[[str], Made], tmp_path: Path) -> None:
    """transformers prefers separate files of templates and special tokens, so none of the base's may stay."""
    made = make("LoRA over fp32")
    base, adapter = shutil.copytree(made.base, tmp_path / "base"), shutil.copytree(made.adapter, tmp_path / "adapter")
    (base / "special_tokens_map.json").write_text('{"pad_token": "t3"}')
    (base / "added_tokens.json").write_text('{"more": 300}')
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("tool")
    (base / "tokenization_own.py").write_text("")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "tokenization_own.Model"}}))
    with quiet():
        tokenizer(TOKENS, "").save_pretrained(adapter)
    (adapter / "chat_template.jinja").unlink()
    config = json.loads((adapter / "tokenizer_config.json").read_text())
    config |= {"chat_template": "adapter's", "pad_token": "t5"}
    (adapter / "tokenizer_config.json").write_text(json.dumps(config))
    expo.merge(base, adapter, 0.3, tmp_path / "out")
    with quiet():
        loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (loaded.chat_template, loaded.pad_token, len(loaded)) == ("adapter's", "t5", TOKENS)
    assert set(contents(tmp_path / "out")) == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenization_own.py",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_configs_that_are_not_the_output_s(make: Callable[[str], Made], tmp_path: Path) -> None:
    """The config beside the adapter is of the quantised base, or of an adapter that was merged into the base."""
    made = make("LoRA over fp32")
    base, adapter = shutil.copytree(made.base, tmp_path / "base"), shutil.copytree(made.adapter, tmp_path / "adapter")
    shutil.copy(adapter / "adapter_config.json", base)
    config = json.loads((base / "config.json").read_text())
    (adapter / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    expo.merge(base, adapter, 0.3, tmp_path / "out")
    expo.merge(*made.pair, 0.3, tmp_path / "plain")
    assert files(tmp_path / "out") == files(tmp_path / "plain")


def test_links_out_of_the_adapter_s_folder(make: Callable[[str], Made], tmp_path: Path) -> None:
    made = make("LoRA over fp32")
    base, adapter = shutil.copytree(made.base, tmp_path / "base"), shutil.copytree(made.adapter, tmp_path / "adapter")
    (tmp_path / "secret").write_text("secret")
    (adapter / "NOTICE").symlink_to(tmp_path / "secret")
    with pytest.raises(expo.PlanError, match=rf"{adapter}/NOTICE is a link out of its folder, to {tmp_path}/secret"):
        expo.merge(base, adapter, 0.3, tmp_path / "out")
    (adapter / "NOTICE").unlink()
    (adapter / "NOTICE").write_text("the adapter's")
    (base / "NOTICE").symlink_to(tmp_path / "secret")
    expo.merge(base, adapter, 0.3, tmp_path / "out")
    assert (tmp_path / "out" / "NOTICE").read_text() == "the adapter's"
    (adapter / "NOTICE").unlink()
    with pytest.raises(expo.PlanError, match=rf"{base}/NOTICE is a link out of its folder"):
        expo.merge(base, adapter, 0.3, tmp_path / "another")


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_the_config_has_the_adapter_s_number_of_tokens(
    make: Callable[[str], Made], tmp_path: Path, alpha: float
) -> None:
    made = make("resized")
    expo.merge(*made.pair, alpha, tmp_path / "out", **made.kind.merge)
    config, before = (json.loads((place / "config.json").read_text()) for place in (tmp_path / "out", made.base))
    assert config == {**before, "vocab_size": MORE_TOKENS}


def test_the_config_where_the_adapter_s_embeddings_are_kept(make: Callable[[str], Made], tmp_path: Path) -> None:
    made = make("resized")
    expo.merge(*made.pair, 0.3, tmp_path / "out", on_mismatch="aligned")
    config, before = (json.loads((place / "config.json").read_text()) for place in (tmp_path / "out", made.base))
    assert config == {**before, "vocab_size": MORE_TOKENS}
    found, whole = read_folder(tmp_path / "out"), full(made)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert found[name] == ("BF16", (MORE_TOKENS, 48), array(whole[name]).astype(ml_dtypes.bfloat16).tobytes())


def test_other_kinds_of_weights_and_training_state_stay_behind(lora: Made, tmp_path: Path) -> None:
    adapter = shutil.copytree(lora.adapter, tmp_path / "adapter")
    for name in ("optimizer.pt", "training_args.bin", "adapter_model.bin", "trainer_state.json", ".hidden"):
        (adapter / name).write_bytes(b"?")
    (adapter / "checkpoint-5").mkdir()
    shutil.copy(adapter / "adapter_config.json", adapter / "checkpoint-5")
    result = expo.merge(lora.base, adapter, 0.3, tmp_path / "out")
    expo.merge(*lora.pair, 0.3, tmp_path / "plain")
    assert files(tmp_path / "out") == files(tmp_path / "plain")
    assert {name for name, _ in result.left_out} >= {"optimizer.pt", "training_args.bin", "adapter_model.bin"}


@pytest.mark.parametrize("name", ["LoRA", "lm_head", "resized", "GPT-2"])
def test_transformers_loads_it_and_its_logits_are_peft_s(
    make: Callable[[str], Made], tmp_path: Path, name: str
) -> None:
    made = make(name)
    exactly = expo.merge(*made.pair, 0, tmp_path / "fp32", dtype="fp32", **made.kind.merge)
    rounded = expo.merge(*made.pair, 0, tmp_path / "as the base", **made.kind.merge)
    tokens = torch.arange(made.kind.tokens - 10, made.kind.tokens)[None]
    with quiet(), torch.no_grad():
        model = new_model(made.kind.family)
        if made.kind.tokens != TOKENS:
            model.resize_token_embeddings(made.kind.tokens)
        model.load_state_dict({key: torch.from_numpy(value) for key, value in made.peft.items()})
        theirs = model.eval()(tokens).logits
        for result, dtype, near in ((exactly, torch.float32, 1e-5), (rounded, TORCH[made.kind.dtype], 3e-2)):
            ours, loading = transformers.AutoModelForCausalLM.from_pretrained(
                result.outputs[0].path, dtype="auto", output_loading_info=True
            )
            assert not any(loading.values())
            assert ours.dtype == dtype
            assert (ours(tokens).logits.float() - theirs).abs().max() <= near * theirs.abs().max()
        assert (ours(tokens).logits.float() - new_model(made.kind.family)(tokens % TOKENS).logits[..., :1]).any()


def test_a_bare_file_below_gives_a_bare_file(make: Callable[[str], Made], tmp_path: Path) -> None:
    made = make("lm_head")
    base = tmp_path / "base.safetensors"
    shutil.copy(made.base / "model.safetensors", base)
    expo.merge(base, made.adapter, 0.3, tmp_path / "out.safetensors", verify=True)
    assert_equal(read_file(tmp_path / "out.safetensors"), expected(made, 0.3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "out.safetensors"]


def test_the_name_of_an_output_that_is_not_given(lora: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expo.merge(*lora.pair, 0.3)
    assert_equal(read_folder(tmp_path / "adapter-expo-0.3"), expected(lora, 0.3))
    (tmp_path / "base.safetensors").write_bytes(safetensors_bytes(read_folder(lora.base)))
    expo.merge("base.safetensors", lora.adapter, 0.3)
    assert_equal(read_file(tmp_path / "adapter-expo-0.3.safetensors"), expected(lora, 0.3))


def test_shards_of_another_size(lora: Made, tmp_path: Path) -> None:
    assert_equal(merge(lora, 0.3, tmp_path / "out", max_shard_size="20KB"), expected(lora, 0.3))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > len(list(lora.base.glob("*.safetensors")))


def test_weights_in_pytorch_s_own_format(make: Callable[[str], Made], tmp_path: Path) -> None:
    """Both the base and the adapter have .bin files."""
    made = make("embedding")
    places = {
        "base": ("model.safetensors", "pytorch_model.bin"),
        "adapter": ("adapter_model.safetensors", "adapter_model.bin"),
    }
    for folder, (stored, pickled) in places.items():
        place = shutil.copytree(made.base.parent / folder, tmp_path / folder)
        tensors = {
            name: torch.frombuffer(bytearray(data), dtype=TORCH[dtype]).reshape(shape)
            for name, (dtype, shape, data) in read_file(place / stored).items()
        }
        torch.save(tensors, place / pickled)
        (place / stored).unlink()
    expo.merge(tmp_path / "base", tmp_path / "adapter", 0.3, tmp_path / "out")
    assert_equal(read_folder(tmp_path / "out"), expected(made, 0.3))


# Reports


@pytest.mark.parametrize("alphas", [(0.3,), (0.0, 0.3, 1.0)])
def test_distances(made: Made, tmp_path: Path, alphas: tuple[float, ...]) -> None:
    result = expo.merge(*made.pair, alphas, tmp_path / "at-{alpha}", **made.kind.merge)
    base, largest, d, aligned = read_folder(made.base), 0.0, [], []
    for name, delta in deltas(made).items():
        d.append(delta.astype(np.float64))
        aligned.append(array(base[name]) + d[-1])
    for name, tensor in full(made).items():
        below = array(base[name]).astype(np.float64)
        aligned.append(array(tensor)[: len(below)].astype(np.float64))
        d.append(aligned[-1] - below)
    squares = [sum(float((x * x).sum()) for x in each) for each in (d, aligned)]
    largest = max(float(np.abs(x).max()) for x in d)
    distance = (squares[0] / squares[1]) ** 0.5
    assert result.relative_distance == pytest.approx(distance, rel=1e-4)
    assert result.max_abs_difference == pytest.approx(largest, rel=1e-4)
    for output in result.outputs:
        assert output.relative_change == pytest.approx(output.alpha * distance, rel=1e-4)
        assert output.non_finite == 0
        assert output.changed > 0.9 if output.alpha else output.changed == 0
    assert result.extrapolated == len(d)
    assert {name for name, reason in result.copied if reason == "not in the adapter"} == base.keys() - {
        *deltas(made), *full(made),
    }  # fmt: skip


def test_overflow_is_counted(make: Callable[[str], Made], tmp_path: Path) -> None:
    made = make("LoRA over fp16")
    result = expo.merge(*made.pair, 1e7, tmp_path / "out")
    with np.errstate(over="ignore"):
        tensors = expected(made, 1e7)
    assert_equal(read_folder(tmp_path / "out"), tensors)
    assert result.outputs[0].non_finite == sum(int(np.isinf(array(tensor)).sum()) for tensor in tensors.values()) > 0


def test_the_plan_names_the_rank(
    make: Callable[[str], Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make("rsLoRA, patterns")
    arguments = ["--sft", str(made.base), "--aligned", str(made.adapter), "--alpha", "0.3", "--plan"]
    arguments += ["--alpha-for", "v_proj=0", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    lines = {line.split()[1]: " ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    name = "model.layers.1.self_attn.k_proj.weight"
    assert lines[name] == f"extrapolate {name} BF16 [24, 48] alpha 0.3, adapter of rank 5 2.3 kB"
    name = name.replace("k_proj", "v_proj")
    assert lines[name] == f"copy {name} BF16 [24, 48] alpha is 0: base and adapter 2.3 kB"
    assert lines["model.norm.weight"].endswith("not in the adapter 96 bytes")
    assert main([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    reasons = {step["name"]: step["reason"] for step in plan["steps"]}
    assert reasons["model.layers.0.self_attn.q_proj.weight"] == "adapter of rank 2"
    assert reasons["model.layers.0.mlp.down_proj.weight"] == "adapter of rank 8"
    stored = read_file(made.adapter / "adapter_model.safetensors")
    unread = [data for key, (_, _, data) in stored.items() if "lora_" not in key]
    assert not unread
    assert plan["bytes_read"] == sum(len(data) for _, _, data in (*read_folder(made.base).values(), *stored.values()))
    assert not (tmp_path / "out").exists()


def test_few_factors_are_held_and_each_is_read_once(lora: Made) -> None:
    with open_inputs(*lora.pair) as (sft, aligned):
        plan, source = make_plan(sft, aligned, (0.3,)), TensorSource(sft, aligned)
        for step in plan.steps:
            for start in range(0, step.nbytes, 500):
                stop = min(start + 500, step.nbytes)
                source.compute(choose("auto", "cpu"), step, start, stop, [bytearray(stop - start)])
        cache = source._factors.cache_info()
    assert cache.misses == len(deltas(lora)) > MOST_FACTORS
    assert cache.currsize == cache.maxsize == MOST_FACTORS
    assert cache.hits > cache.misses


def test_workers_who_come_to_a_tensor_together_read_its_factors_once(
    lora: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, seen = TensorSource._read_factors, []

    def slow(self: TensorSource, delta: LowRank) -> Any:
        seen.append(delta)
        time.sleep(0.1)
        return read(self, delta)

    monkeypatch.setattr(TensorSource, "_read_factors", slow)
    with open_inputs(*lora.pair) as (sft, aligned), ThreadPoolExecutor(4) as pool:
        plan, source = make_plan(sft, aligned, (0.3,)), TensorSource(sft, aligned)
        step = next(step for step in plan.steps if step.deltas is not None)
        outs = [bytearray(1000) for _ in range(4)]
        list(pool.map(lambda out: source.compute(choose("auto", "cpu"), step, 0, 1000, [out]), outs))
    assert len(seen) == 1
    assert len(set(map(bytes, outs))) == 1


def test_the_base_below_a_delta_is_read_once(lora: Made) -> None:
    with open_inputs(*lora.pair) as (sft, aligned):
        step = next(step for step in make_plan(sft, aligned, (0.3,)).steps if step.deltas is not None)
        assert len(TensorSource(sft, aligned).spans(step, 0, step.nbytes)) == 1


def test_a_whole_tensor_over_a_weight_of_integers_is_refused(lora: Made, tmp_path: Path) -> None:
    """A base with a weight of integers is quantised, even if the adapter has a whole tensor for that weight."""
    name = "model.norm.weight"
    base, adapter = (Path(shutil.copytree(path, tmp_path / path.name)) for path in lora.pair)
    tensors = {**read_folder(base), name: ("I64", (48,), bytes(48 * 8))}
    for path in base.glob("model*"):
        path.unlink()
    (base / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    own = ("F32", (48,), np.arange(48, dtype=np.float32).tobytes())
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(safetensors_bytes({**read_file(weights), PREFIX + name: own}))
    for option in ("error", "aligned"):
        with pytest.raises(expo.PlanError, match=rf"sft .* is quantised .*'{name}' is I64 \[48\]"):
            expo.merge(base, adapter, 0.3, tmp_path / "out", on_mismatch=option)


def test_a_floating_point_mode_that_cannot_be_worked_in_is_an_error_of_ours(lora: Made) -> None:
    torch.set_flush_denormal(True)  # the threads that compute inherit this mode
    try:
        with pytest.raises(expo.EngineError, match=r"failed on model\..*floating-point mode flushes subnormals"):
            list(expo.stream(*lora.pair, 0.3))
    finally:
        torch.set_flush_denormal(False)
