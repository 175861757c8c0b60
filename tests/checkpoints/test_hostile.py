"""Hostile headers, indexes, configs and journals: each is read correctly, or refused with an ExpoError.

No process crashes or hangs, no false number makes it allocate memory, and no file outside the named folders is read or
written.
"""

from __future__ import annotations

import contextlib
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import fingerprint, random_tensors, safetensors_bytes, write_folder
from cpu_time import at_most
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import expo
from expo.checkpoints.files import INDEX, SINGLE
from expo.output.journal import encode, read_journal
from expo.output.staging import JOURNAL

FIRST = "model-00001-of-00002.safetensors"
SHAPES = {"a": ("BF16", (40, 11)), "b": ("F32", (7,)), "c": ("I64", (3,))}
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MANY = settings(FEW, max_examples=5000)
MEMORY = 30_000_000  # most bytes of memory that a refusal may take

Anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20)
    | st.sampled_from(["BF16", "F32", SINGLE, "../x", "/etc/passwd", "a" * 300, "\0", FIRST]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


def pair(folder: Path) -> tuple[Path, Path]:
    return tuple(write_folder(folder / name, random_tensors(SHAPES, i), shards=2) for i, name in enumerate("sa"))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    pair(folder)
    return folder


def attempt(place: Path, work: Callable[[], object]) -> None:
    """Assert that the action works or is refused, in seconds and little memory, and writes in `out` alone."""
    before = fingerprint(place / "s", place / "a")
    tracemalloc.start()
    try:
        with at_most(5), contextlib.suppress(expo.ExpoError):
            work()
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < MEMORY
    assert fingerprint(place / "s", place / "a") == before
    assert {path.name for path in place.iterdir()} <= {"s", "a", "out", ".out.expo-staging"}


def merge_over(place: Path, file: str, data: bytes, **more: Any) -> None:
    """Return a merge whose aligned folder has this file with other contents."""
    path = place / "a" / file
    kept = path.read_bytes() if path.exists() else None
    path.write_bytes(data)
    try:
        attempt(place, lambda: expo.merge(place / "s", place / "a", 0.5, place / "out", overwrite=True, **more))
    finally:
        path.unlink() if kept is None else path.write_bytes(kept)


def file_of(header: Any, body: int = 64) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(body)


entries = st.fixed_dictionaries(
    {},
    optional={"dtype": Anything, "shape": Anything, "data_offsets": Anything, "extra": Anything},
)
headers = st.dictionaries(st.sampled_from(["a", "b", "__metadata__", "../../x", ""]), entries | Anything, max_size=4)


def fuzz_header(place: Path, header: Any, body: int) -> None:
    merge_over(place, FIRST, file_of(header, body))


def fuzz_bytes(place: Path, data: bytes) -> None:
    merge_over(place, FIRST, data)


def fuzz_index(place: Path, index: Any) -> None:
    merge_over(place, INDEX, json.dumps(index).encode())


def fuzz_config(place: Path, config: Any) -> None:
    merge_over(place, "config.json", json.dumps(config).encode())


indexes = Anything | st.fixed_dictionaries(
    {"weight_map": st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), Anything, max_size=4) | Anything},
    optional={"metadata": Anything},
)
configs = Anything | st.fixed_dictionaries({}, optional={"model_type": Anything, "quantization_config": Anything})


@FEW
@given(headers, st.integers(0, 2000))
def test_header(place: Path, header: Any, body: int) -> None:
    fuzz_header(place, header, body)


@FEW
@given(st.binary(max_size=200) | st.integers(0, 2**64 - 1).map(lambda n: n.to_bytes(8, "little") + b'{"a":1}'))
def test_bytes(place: Path, data: bytes) -> None:
    fuzz_bytes(place, data)


@FEW
@given(indexes)
def test_index(place: Path, index: Any) -> None:
    fuzz_index(place, index)


@FEW
@given(configs)
def test_config(place: Path, config: Any) -> None:
    fuzz_config(place, config)


@pytest.mark.exhaustive
@MANY
@given(st.data())
def test_all_of_them_for_long(place: Path, data: st.DataObject) -> None:
    fuzz_header(place, data.draw(headers), data.draw(st.integers(0, 2000)))
    fuzz_bytes(place, data.draw(st.binary(max_size=200)))
    fuzz_index(place, data.draw(indexes))
    fuzz_config(place, data.draw(configs))
    fuzz_journal(place, data.draw(journals))


# The journal

records = Anything | st.fixed_dictionaries(
    {"done": st.lists(st.tuples(st.sampled_from([FIRST, "x", 7]), Anything, Anything, Anything).map(list), max_size=3)}
)
journals = st.binary(max_size=100) | st.lists(records, max_size=4)


def good_head(place: Path) -> Any:
    """Return the first line of the journal of an interrupted merge."""
    out = place / "out"
    stop = RuntimeError("stop")

    def fail(done: int, total: int) -> None:
        raise stop

    with pytest.raises(RuntimeError):
        expo.merge(place / "s", place / "a", 0.5, out, overwrite=True, progress=fail)
    found = read_journal(str(place / ".out.expo-staging" / JOURNAL))
    assert found is not None
    return {"merge": found.merge, "chunk": found.chunk_size}


def fuzz_journal(place: Path, lines: Any) -> None:
    """The merge that resumes gives the right bytes or refuses, whatever follows a good first line."""
    head = good_head(place)
    data = lines if isinstance(lines, bytes) else b"".join(encode(line) for line in lines)
    (place / ".out.expo-staging" / JOURNAL).write_bytes(encode(head) + data)
    work = lambda: expo.merge(place / "s", place / "a", 0.5, place / "out", overwrite=True, resume=True)  # noqa: E731
    attempt(place, work)


@FEW
@given(journals)
def test_journal(place: Path, lines: Any) -> None:
    fuzz_journal(place, lines)


@pytest.mark.parametrize(
    "head", [{"merge": 1, "chunk": 0}, {"merge": {}, "chunk": -4096}, {"chunk": 1 << 80}, [], None]
)
def test_first_line_of_a_journal(place: Path, head: Any) -> None:
    good_head(place)
    (place / ".out.expo-staging" / JOURNAL).write_bytes(encode(head))
    attempt(place, lambda: expo.merge(place / "s", place / "a", 0.5, place / "out", overwrite=True, resume=True))


@pytest.mark.parametrize("chunk", [1, 4095, 1 << 40])
def test_chunk_size_of_a_journal(place: Path, chunk: int) -> None:
    """A number that would cut elements in two, or allocate all memory, is ignored."""
    head = good_head(place)
    (place / ".out.expo-staging" / JOURNAL).write_bytes(encode({**head, "chunk": chunk}))
    attempt(place, lambda: expo.merge(place / "s", place / "a", 0.5, place / "out", overwrite=True, resume=True))
    expo.merge(place / "s", place / "a", 0.5, place / "plain")
    assert fingerprint(place / "out").values() != {}
    ours, theirs = ({p.name: p.read_bytes() for p in (place / name).iterdir()} for name in ("out", "plain"))
    for path in (place / "plain").iterdir():
        path.unlink()
    (place / "plain").rmdir()
    assert ours == theirs


# Paths


def test_links_out_of_the_folder_are_not_copied(tmp_path: Path) -> None:
    sft, aligned = pair(tmp_path)
    secret = tmp_path / "secret"
    secret.write_text("key")
    (aligned / "tokenizer.json").symlink_to("../secret")
    with pytest.raises(expo.PlanError, match=rf"tokenizer\.json is a link out of its folder, to {secret}"):
        expo.merge(sft, aligned, 0.5, tmp_path / "out")
    (aligned / "tokenizer.json").unlink()
    (aligned / "tokenizer.json").symlink_to("config.json")
    expo.merge(sft, aligned, 0.5, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (aligned / "config.json").read_bytes()


def test_a_hub_caches_blobs_belong_to_its_snapshots(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    sft, aligned = pair(cache / "snapshots")
    for path in list(aligned.iterdir()):
        path.rename(cache / "blobs" / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    expo.merge(sft, aligned, 0.5, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()
    assert not (tmp_path / "out" / "config.json").is_symlink()


@pytest.mark.parametrize("options", [{"overwrite": True}, {"resume": True}, {}])
def test_a_link_in_the_place_of_staging_is_not_followed(tmp_path: Path, options: dict[str, bool]) -> None:
    sft, aligned = pair(tmp_path)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("...")
    (tmp_path / ".out.expo-staging").symlink_to("precious")
    with pytest.raises(expo.OutputError, match=r"\.out\.expo-staging: "):
        expo.merge(sft, aligned, 0.5, tmp_path / "out", **options)
    assert (tmp_path / "precious" / "thesis.tex").read_text() == "..."


@pytest.mark.parametrize("name", [FIRST, "config.json"])
def test_links_inside_staging_are_not_followed(tmp_path: Path, name: str) -> None:
    """Links in the staging folder of an interrupted merge: one in a shard's place is refused, any other is replaced."""
    sft, aligned = pair(tmp_path)
    good_head_in(tmp_path, sft, aligned)
    (tmp_path / "precious").write_text("...")
    place = tmp_path / ".out.expo-staging" / name
    place.unlink(missing_ok=True)
    place.symlink_to("../precious")
    if name == FIRST:
        with pytest.raises(expo.OutputError, match=rf"{name}: "):
            expo.merge(sft, aligned, 0.5, tmp_path / "out", resume=True)
    else:
        expo.merge(sft, aligned, 0.5, tmp_path / "out", resume=True)
        assert not (tmp_path / "out" / name).is_symlink()
    assert (tmp_path / "precious").read_text() == "..."


def good_head_in(folder: Path, sft: Path, aligned: Path) -> None:
    def fail(done: int, total: int) -> None:
        if done:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        expo.merge(sft, aligned, 0.5, folder / "out", progress=fail)


def test_code_is_copied_and_never_run(tmp_path: Path) -> None:
    sft, aligned = pair(tmp_path)
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    for folder in (sft, aligned):
        for name in ("modeling_custom.py", "config.py", "__init__.py", "json.py"):
            (folder / name).write_text(code)
    config = json.loads((aligned / "config.json").read_text())
    named = {"AutoModel": "modeling_custom.Own", "AutoConfig": "json.Own", "AutoTokenizer": "../../../etc/passwd.Own"}
    (aligned / "config.json").write_text(json.dumps({**config, "auto_map": named}))
    expo.merge(sft, aligned, 0.5, tmp_path / "out")
    assert (tmp_path / "out" / "modeling_custom.py").read_text() == code
    assert not (tmp_path / "ran").exists()


def test_a_name_that_climbs_out_of_the_index(tmp_path: Path) -> None:
    sft, aligned = pair(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes(random_tensors(SHAPES, 0)))
    (aligned / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(SHAPES, "../x.safetensors")}))
    with pytest.raises(expo.CheckpointError, match="not a file name in this folder"):
        expo.merge(sft, aligned, 0.5, tmp_path / "out")


def test_the_fuzz_would_notice(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`attempt` fails for an error that is no ExpoError, and for a refusal that takes memory."""
    with pytest.raises(ZeroDivisionError):
        attempt(place, lambda: 1 // 0)
    with pytest.raises(AssertionError):
        attempt(place, lambda: len(bytearray(2 * MEMORY)))
