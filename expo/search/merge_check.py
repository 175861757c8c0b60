"""Check that a merged model is the model that a search has judged."""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Mapping
from typing import Any

import torch

from ..checkpoints.files import CONFIG, load_json
from ..errors import CheckpointError
from ..inputs.locations import StrPath
from ..tensors.model_weights import saved_weights
from .models import generating_class, load_model

MOST_WEIGHTS = 20  # weights that a message names


def weight_digests(model: Any) -> dict[str, str]:
    """Return the SHA-256 of each weight of a model, over its dtype, its shape and its bytes."""
    digests = {}
    for name, tensor in saved_weights(model).items():
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        digests[name] = digest.hexdigest()
    return digests


def check_merge(folder: StrPath, judged: Mapping[str, str], trust_remote_code: bool = False) -> None:
    """Load a merged model and compare its weights with those that a search has judged.

    Args:
        folder: The output of the merge.
        judged: The digests of a SearchResult.
        trust_remote_code: True if code that comes with the model may run.

    Raises:
        CheckpointError: The output cannot be loaded, or it is another model.
    """
    gc.collect()  # the judged model may refer to itself, and its memory must be free before this one is loaded
    try:
        kind = generating_class(load_json(os.path.join(folder, CONFIG), missing={}))
        digests = weight_digests(load_model(kind, str(folder), torch.device("cpu"), trust_remote_code))
    except CheckpointError as error:
        raise CheckpointError(
            f"the merge is written to {folder}, but it cannot be compared with the model that was judged: {error}"
        ) from error
    wrong = sorted(name for name in {*digests, *judged} if digests.get(name) != judged.get(name))
    if wrong:
        more = f"\n  and {len(wrong) - MOST_WEIGHTS} more" if len(wrong) > MOST_WEIGHTS else ""
        names = "".join(f"\n  {name}" for name in wrong[:MOST_WEIGHTS])
        raise CheckpointError(
            f"the merge is written to {folder}, but it is not the model that was judged: {len(wrong)} of "
            f"{len(digests)} weights differ. The search does not apply to this merge; search once more, with the "
            f"merge as `aligned` and with `alphas=[0]`:{names}{more}"
        )
