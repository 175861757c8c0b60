"""The sweep of adapters: a LoRA adapter of each model type, merged here and by PEFT.

    python tests/architectures/adapters.py [KIND ...] [--types TYPE,TYPE]

makes an adapter of all linear modules of a tiny model for each model type, each in a forked child, and writes the
results to tests/architectures/adapters.json and to docs/architectures.md. Results of model types that are not named
stay.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import sweep
import torch
from tiny_configs import tiny_config
from tiny_pairs import auto_class, load, model_types

import expo


def check_adapter(kind: str, model_type: str, folder: Path) -> list[str]:
    """Return what is wrong with the merge of an adapter of one model type; [] if everything is right.

    Raises:
        Exception: transformers or PEFT cannot make, save or load the tiny model or the adapter.
    """
    import peft

    auto: Any = auto_class(kind)
    torch.manual_seed(1)
    model = auto.from_config(tiny_config(model_type), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.copy_(torch.randn(parameter.shape) * 0.05)
    model.save_pretrained(folder / "base")
    loads = auto if type(model.config) in auto._model_mapping else type(model)
    wrapped: Any = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    wrapped.save_pretrained(folder / "adapter")
    wanted = {name: tensor.clone() for name, tensor in wrapped.merge_and_unload().state_dict().items()}
    try:
        expo.merge(folder / "base", folder / "adapter", 0, folder / "out")
    except expo.ExpoError as error:
        return [f"{type(error).__name__}: {error}".replace(f"{folder}/", "")]
    found, _ = load(loads, folder / "out")
    return _differences(found.state_dict(), wanted)


def _differences(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    """Return a line for each tensor that is not PEFT's, up to the order in which PEFT sums a product."""
    problems = []
    for name, tensor in found.items():
        other = wanted.get(name)
        if other is None or other.shape != tensor.shape:
            problems.append(f"{name}: PEFT's merge does not have it")
        elif tensor.is_floating_point() and not torch.allclose(tensor.float(), other.float(), rtol=1e-4, atol=1e-5):
            problems.append(f"{name}: other numbers than in PEFT's merge")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(sweep.KINDS)}")
    parser.add_argument("--types", default="", help="model types, separated by commas")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    types = set(filter(None, arguments.types.split(",")))
    results: dict[str, dict[str, str]] = sweep.read_results(sweep.ADAPTERS).get("results", {})
    for kind in arguments.kinds or sweep.KINDS:
        for model_type in model_types(kind):
            if (kind, model_type) in sweep.NOT_CHECKED or (types and model_type not in types):
                continue
            found = sweep.check_in_child(kind, model_type, check_adapter)
            results.setdefault(kind, {})[model_type] = found
            print(kind, model_type, found.splitlines()[-1][:160], flush=True)
            sweep.write_results(results, sweep.ADAPTERS)
    sweep.write_results(sweep.read_results()["results"], sweep.RESULTS)


if __name__ == "__main__":
    main()
