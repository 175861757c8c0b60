"""The sweep of architectures: a tiny pair of each model type of the installed transformers, merged in every way.

    python tests/architectures/sweep.py [KIND ...] [--types TYPE,TYPE] [--again failed|all]

checks the model types of these kinds, each in a forked child with a limit of time and of memory, and writes the results
to tests/architectures/results.json and to docs/architectures.md. Results that are there already stay, unless --again
says otherwise; with --results FILE, they go to that file alone. The expected numbers are torch's: a difference, a
product and a sum in fp32, and one rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parents[1])]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import architectures_page  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from tiny_pairs import ALPHA, Pair, check_same, formula, load, make_pair, model_types, read, ties  # noqa: E402

import expo  # noqa: E402

RESULTS, ADAPTERS = HERE / "results.json", HERE / "adapters.json"
KINDS = ("causal", "seq2seq", "vision-language", "encoder")
SECONDS, MEMORY = 120, 8 << 30  # the limits of one child
PASSED = "passed"
Check = Callable[[str, str, Path], list[str]]
_LARGE = "its tokens of images have a model of their own, which has no small config"
_CLASS = "its config is not the one of the class that the automatic class makes"
_TIMM = "its tower is timm's, which is not installed"
# Model types that are not checked, with the reasons: they have no small model, or transformers itself fails with them.
NOT_CHECKED = {
    ("causal", "dots3_note"): "its config for single layers has no small form",
    ("causal", "dots3_note_text"): "its config for single layers has no small form",
    ("causal", "gemma3n"): _TIMM,
    ("causal", "gemma4_assistant"): "its config fits one size of another model",
    ("causal", "musicgen"): _CLASS,
    ("causal", "musicgen_melody"): _CLASS,
    ("seq2seq", "nemo_speechlm"): "transformers does not load what it has saved",
    ("seq2seq", "vibevoice_asr"): _LARGE,
    ("vision-language", "apertus1p5"): _LARGE,
    ("vision-language", "chameleon"): _LARGE,
    ("vision-language", "diffusion_gemma"): "its default config has sizes that are None",
    ("vision-language", "dots3_note"): "its config for single layers has no small form",
    ("vision-language", "emu3"): _LARGE,
    ("vision-language", "ernie4_5_vl_moe"): "transformers cannot make it with few experts",
    ("vision-language", "evolla"): "no automatic class loads it",
    ("vision-language", "fast_vlm"): _TIMM,
    ("vision-language", "florence2"): _LARGE,
    ("vision-language", "gemma3n"): _TIMM,
    ("vision-language", "inkling_mm_model"): "it needs scipy, which is not installed",
    ("vision-language", "janus"): _LARGE,
    ("vision-language", "muse_spark"): _LARGE,
    ("vision-language", "perception_lm"): _TIMM,
    ("vision-language", "shieldgemma2"): "transformers loads it with other weights than it has saved",
    ("encoder", "reformer"): "its small config is that of a decoder",
}


def check(kind: str, model_type: str, folder: Path) -> list[str]:
    """Return what is wrong with the merges of one model type; [] if everything is right.

    Raises:
        Exception: transformers cannot make, save or load the tiny model.
    """
    pair = make_pair(kind, model_type, folder)
    problems: list[str] = []
    for name, run in CHECKS.items():
        try:
            problems += [f"{name}: {text}" for text in run(pair)]
        except expo.ExpoError as error:
            problems.append(f"{name}: {type(error).__name__}: {error}")
        if name == "files" and problems:
            break  # the other checks compare with these files
    return problems


def check_files(pair: Pair) -> list[str]:
    """Merge both folders; each tensor of the output's files must be the formula's."""
    expo.merge(pair.sft, pair.aligned, ALPHA, pair.out, quiet=True)
    sft, aligned = read(pair.sft), read(pair.aligned)
    return check_same(read(pair.out), {name: formula(tensor, sft[name]) for name, tensor in aligned.items()})


def check_loaded(pair: Pair) -> list[str]:
    """Load the output; nothing may be missing, ties must be kept, and the state dict must be the formula's."""
    sft, _ = load(pair.auto, pair.sft)
    aligned, expected_info = load(pair.auto, pair.aligned)
    out, info = load(pair.auto, pair.out)
    others = sft.state_dict()
    expected = {name: formula(tensor, others[name]) for name, tensor in aligned.state_dict().items()}
    problems = check_same(out.state_dict(), expected, rounded=True)
    if info != expected_info:
        problems.append(f"transformers reports {info}, and {expected_info} of aligned")
    if ties(out) != ties(aligned):
        problems.append(f"the ties are {ties(out)}, and those of aligned {ties(aligned)}")
    return problems


def check_live(pair: Pair) -> list[str]:
    """Set alpha in a model in memory over sft's folder; it must be the loaded output, and aligned again at the end."""
    model, _ = load(pair.auto, pair.aligned)
    out, _ = load(pair.auto, pair.out)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with expo.Live(model, pair.sft) as live:
        live.alpha = ALPHA
        problems = check_same(model.state_dict(), out.state_dict(), rounded=True)
    return problems + [f"after the end, {text}" for text in check_same(model.state_dict(), before)]


def check_state_as_sft(pair: Pair) -> list[str]:
    """Merge with sft as a state dict from memory; the output must have the bytes of the merge of both folders."""
    folder = pair.save_state("sft", pair.sft_state)
    expo.merge(folder, pair.aligned, ALPHA, pair.folder / "state-sft-out", quiet=True)
    return check_same(read(pair.folder / "state-sft-out"), read(pair.out))


def check_state_as_aligned(pair: Pair) -> list[str]:
    """Merge with aligned as a state dict from memory; the output has its names and the formula's numbers."""
    folder = pair.save_state("aligned", pair.aligned_state)
    expo.merge(pair.sft, folder, ALPHA, pair.folder / "state-aligned-out", quiet=True)
    states = pair.sft_state, pair.aligned_state
    expected = {name: formula(tensor, states[0][name]) for name, tensor in states[1].items()}
    return check_same(read(pair.folder / "state-aligned-out"), expected)


CHECKS: Mapping[str, Callable[[Pair], list[str]]] = {
    "files": check_files,
    "loaded": check_loaded,
    "live": check_live,
    "state dict as sft": check_state_as_sft,
    "state dict as aligned": check_state_as_aligned,
}


def check_in_child(kind: str, model_type: str, check: Check = check) -> str:
    """Check a model type in a forked child and return its result in one text."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as report:
        child = os.fork()
        if child == 0:
            _work(kind, model_type, Path(folder), report, check)
        _, status = os.waitpid(child, 0)
        report.seek(0)
        text = report.read()
    return text or f"the process ended with status {status}"


def _work(kind: str, model_type: str, folder: Path, report: Any, check: Check) -> None:
    """Check a model type in this process, write the result and end the process."""
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.alarm(SECONDS)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        report.write("\n".join(check(kind, model_type, folder)) or PASSED)
    except BaseException:
        report.write(f"not checked: {traceback.format_exc()[-1500:]}")
    report.flush()
    os._exit(0)


def read_results(path: Path = RESULTS) -> dict[str, Any]:
    """Return the results in a file; {} if they are of another version of transformers."""
    known = json.loads(path.read_text()) if path.exists() else {}
    return known if known.get("transformers") == transformers.__version__ else {}


def sweep(kinds: Iterable[str], types: set[str], again: str, path: Path) -> None:
    """Check model types and write each result as soon as it is there.

    Args:
        kinds: The kinds.
        types: The model types; all of them if it is empty.
        again: "all" or "failed" to check model types again that have a result.
        path: The file of the results.
    """
    results: dict[str, dict[str, str]] = read_results(path).get("results", {})
    assert callable(expo.merge)  # both are imported here, so that the children need not do it
    assert callable(expo.Live)
    for kind in kinds:
        for model_type in model_types(kind):
            known = results.setdefault(kind, {}).get(model_type)
            is_wanted = not types or model_type in types
            is_known = known is not None and again != "all" and not (again == "failed" and known != PASSED)
            if not is_wanted or is_known:
                continue
            reason = NOT_CHECKED.get((kind, model_type))
            results[kind][model_type] = f"not checked: {reason}" if reason else check_in_child(kind, model_type)
            print(kind, model_type, results[kind][model_type].splitlines()[-1][:160], flush=True)
            write_results(results, path)


def write_results(results: Mapping[str, Mapping[str, str]], path: Path) -> None:
    """Write the results, and the page about them if they are in the usual file."""
    ordered = {kind: dict(sorted(results[kind].items())) for kind in KINDS if results.get(kind)}
    data = {"transformers": transformers.__version__, "results": ordered}
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(unfinished, path)
    if path == RESULTS:
        architectures_page.PAGE.write_text(architectures_page.page_text(data, json.loads(ADAPTERS.read_text())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--types", default="", help="model types, separated by commas")
    parser.add_argument("--again", choices=["no", "failed", "all"], default="no")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    types = set(filter(None, arguments.types.split(",")))
    sweep(arguments.kinds or KINDS, types, arguments.again, arguments.results)


if __name__ == "__main__":
    main()
