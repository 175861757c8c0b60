"""Where a tensor stands in a model, by its name: its layer, and its kind among those of a layer."""

from __future__ import annotations

import re
from typing import NamedTuple

from ..checkpoints.model_parts import EMBEDDING, HEAD

LAYER = re.compile(r"^((?:.*?\.)?(?:layers?|h|blocks?|resblocks|(?:en|de)coder_layers))\.(\d+)\.(.+)$")
NORM = re.compile(r"norm|(^|_)ln(_|$|\d)", re.IGNORECASE)
TOKENS = re.compile(r"embed|(^|\.)(wte|wpe)\b", re.IGNORECASE)
ENDS = re.compile(r"(^|\.)(lm_head|embed_out|score|classifier|v_head|value_head|reward_head|pooler)\b")
EMBEDDINGS, HEADS, NORMS, OTHER = "embeddings", "head", "norms", "other"
OUTSIDE = (EMBEDDINGS, HEADS, NORMS, OTHER)
# Of what a module's name ends in, where it stands in a table.
ORDER = re.compile(
    r"(q_proj|query|q_lin|wq|SelfAttention\.q|\.q)$|(k_proj|key|k_lin|wk|\.k)$|(v_proj|value|v_lin|wv|\.v)$|"
    r"(qkv\w*|query_key_value|c_attn|Wqkv)$|((o|out)_proj|(?<!Dense\.)wo|attn\.c_proj|attention\.dense|\.o|out_lin)$|"
    r"((?<!experts\.)gate|router)$|(gate_proj|gate_up_proj|w1|wi_0)$|(up_proj|w3|c_fc|fc1|wi\w*|dense_h_to_4h)$|"
    r"(down_proj|w2|Dense\.wo|mlp\.c_proj|fc2|dense_4h_to_h)$"
)


class Place(NamedTuple):
    """Where a tensor stands: see Part."""

    stack: str
    layer: int | None
    kind: str


def place(name: str) -> Place:
    """A tensor's, by its name."""
    found = LAYER.match(name)
    module = _module(found[3] if found else name)
    last = module.rpartition(".")[2]
    if found:
        return Place(found[1], int(found[2]), NORMS if NORM.search(last) else module)
    if HEAD.search(name) or ENDS.search(name):
        return Place("", None, HEADS)
    if NORM.search(last):
        return Place("", None, NORMS)
    return Place("", None, EMBEDDINGS if EMBEDDING.search(name) or TOKENS.search(name) else OTHER)


def _module(name: str) -> str:
    """Without weight or bias, and without the numbers of experts and of parts of a layer."""
    name = re.sub(r"\.(weight|bias|gamma|beta)$", "", name)
    name = re.sub(r"^(layers?|sub_?layers?)\.\d+\.", "", name)
    return re.sub(r"\.\d+(?=\.|$)", "", name)


def kind_order(kind: str) -> int:
    """Where a kind of module stands among others: as the data flow through a layer, norms last."""
    found = ORDER.search(kind)
    return 99 if kind == NORMS else found.lastindex or 0 if found else 50


def label(where: Place) -> str:
    """Its name in a report."""
    return ".".join(filter(None, [where.stack, "" if where.layer is None else str(where.layer), where.kind]))
