"""Find the place of a tensor in a model by its name: its layer, and the kind of its module."""

from __future__ import annotations

import re
from typing import NamedTuple

from ..checkpoints.model_parts import EMBEDDING, HEAD

LAYER = re.compile(r"^((?:.*?\.)?(?:layers?|h|blocks?|resblocks|(?:en|de)coder_layers))\.(\d+)\.(.+)$")
NORM_NAME = re.compile(r"norm|(^|_)ln(_|$|\d)", re.IGNORECASE)
EMBEDDING_NAME = re.compile(r"embed|(^|\.)(wte|wpe)\b", re.IGNORECASE)
HEAD_NAME = re.compile(r"(^|\.)(lm_head|embed_out|score|classifier|v_head|value_head|reward_head|pooler)\b")
EMBEDDINGS, HEADS, NORMS, OTHER = "embeddings", "head", "norms", "other"
OUTSIDE = (EMBEDDINGS, HEADS, NORMS, OTHER)  # the kinds outside of layers, in the order of a report
# The order of the kinds of a layer in a report: a kind's number is the number of the group that its name matches.
KIND_ORDER = re.compile(
    r"(q_proj|query|q_lin|wq|SelfAttention\.q|\.q)$|(k_proj|key|k_lin|wk|\.k)$|(v_proj|value|v_lin|wv|\.v)$|"
    r"(qkv\w*|query_key_value|c_attn|Wqkv)$|((o|out)_proj|(?<!Dense\.)wo|attn\.c_proj|attention\.dense|\.o|out_lin)$|"
    r"((?<!experts\.)gate|router)$|(gate_proj|gate_up_proj|w1|wi_0)$|(up_proj|w3|c_fc|fc1|wi\w*|dense_h_to_4h)$|"
    r"(down_proj|w2|Dense\.wo|mlp\.c_proj|fc2|dense_4h_to_h)$"
)


class Place(NamedTuple):
    """The place of a tensor in a model; Part explains the fields."""

    stack: str
    layer: int | None
    kind: str


def find_place(name: str) -> Place:
    """Return the place of the tensor with this name."""
    match = LAYER.match(name)
    module = _module_of(match[3] if match else name)
    last = module.rpartition(".")[2]
    if match:
        return Place(match[1], int(match[2]), NORMS if NORM_NAME.search(last) else module)
    if HEAD.search(name) or HEAD_NAME.search(name):
        return Place("", None, HEADS)
    if NORM_NAME.search(last):
        return Place("", None, NORMS)
    return Place("", None, EMBEDDINGS if EMBEDDING.search(name) or EMBEDDING_NAME.search(name) else OTHER)


def _module_of(name: str) -> str:
    """Return a tensor's name without weight or bias, and without the numbers of experts and of parts of a layer."""
    name = re.sub(r"\.(weight|bias|gamma|beta)$", "", name)
    name = re.sub(r"^(layers?|sub_?layers?)\.\d+\.", "", name)
    return re.sub(r"\.\d+(?=\.|$)", "", name)


def kind_rank(kind: str) -> int:
    """Return the position of a kind in a report: kinds follow the data flow through a layer, and norms are last."""
    match = KIND_ORDER.search(kind)
    return 99 if kind == NORMS else match.lastindex or 0 if match else 50


def label_of(place: Place) -> str:
    """Return the name of a place in a report."""
    return ".".join(filter(None, [place.stack, "" if place.layer is None else str(place.layer), place.kind]))
