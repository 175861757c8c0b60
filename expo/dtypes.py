"""List the dtypes: their names in safetensors, torch, NumPy and `--dtype`, and their bits. No other module has a list.

Source of the names and bits: github.com/huggingface/safetensors, `Dtype` in tensor.rs.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple


class Dtype(NamedTuple):
    """One dtype of the safetensors format.

    Attributes:
        bits: Bits of one element.
        torch: The name of torch's dtype; "" where torch has none.
        extrapolated: True if tensors of this dtype are extrapolated. Tensors of other dtypes are copied or refused.
        option: The word for the dtype on the command line; "" if an output cannot be written in this dtype.
    """

    bits: int
    torch: str = ""
    extrapolated: bool = False
    option: str = ""


# safetensors' own writer sorts tensors by dtype in this order, the last dtype first.
TABLE = {
    "BOOL": Dtype(8, "bool"),
    "F4": Dtype(4),
    "F6_E2M3": Dtype(6),
    "F6_E3M2": Dtype(6),
    "U8": Dtype(8, "uint8"),
    "I8": Dtype(8, "int8"),
    "F8_E5M2": Dtype(8, "float8_e5m2"),
    "F8_E4M3": Dtype(8, "float8_e4m3fn"),
    "F8_E8M0": Dtype(8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": Dtype(8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": Dtype(8, "float8_e5m2fnuz"),
    "I16": Dtype(16, "int16"),
    "U16": Dtype(16, "uint16"),
    "F16": Dtype(16, "float16", True, "fp16"),
    "BF16": Dtype(16, "bfloat16", True, "bf16"),
    "I32": Dtype(32, "int32"),
    "U32": Dtype(32, "uint32"),
    "F32": Dtype(32, "float32", True, "fp32"),
    "C64": Dtype(64, "complex64"),
    "F64": Dtype(64, "float64", True),
    "I64": Dtype(64, "int64"),
    "U64": Dtype(64, "uint64"),
}
BITS = {name: dtype.bits for name, dtype in TABLE.items()}
# The bytes of one element of each dtype that is extrapolated; dtypes with fewer bytes come first.
ITEMSIZE = {name: TABLE[name].bits // 8 for name in ("BF16", "F16", "F32", "F64")}
INTEGERS = frozenset(name for name in TABLE if name[0] in "IU" or name == "BOOL")
OUTPUT_DTYPES = {TABLE[name].option: name for name in ("BF16", "F16", "F32")}
FROM_TORCH = {dtype.torch: name for name, dtype in TABLE.items() if dtype.torch}


@cache
def torch_dtypes() -> dict[str, Any]:
    """Return torch's dtypes by the safetensors name, for the dtypes that are extrapolated; this imports torch."""
    import torch

    return {name: getattr(torch, TABLE[name].torch) for name in ITEMSIZE}


@cache
def numpy_dtypes() -> dict[str, Any]:
    """Return NumPy's dtypes by the safetensors name, for all dtypes that torch has.

    NumPy and ml_dtypes have the names of torch: this imports ml_dtypes. A dtype that an old ml_dtypes lacks is left
    out.
    """
    import ml_dtypes
    import numpy as np

    names = {name: dtype.torch for name, dtype in TABLE.items() if dtype.torch}
    return {
        name: np.dtype(getattr(ml_dtypes, dtype, dtype))
        for name, dtype in names.items()
        if hasattr(ml_dtypes, dtype) or not dtype.startswith("float8")
    }


@cache
def torch_names() -> dict[Any, str]:
    """Return the safetensors name of every dtype of torch that has one; this imports torch."""
    import torch

    return {getattr(torch, dtype): name for dtype, name in FROM_TORCH.items() if hasattr(torch, dtype)}


@cache
def numpy_names() -> dict[Any, str]:
    """Return the safetensors name of NumPy's dtypes, for those of `numpy_dtypes`."""
    return {dtype: name for name, dtype in numpy_dtypes().items()}
