"""The alpha whose replies a reward likes best: python -m expo.search, and search_alpha() in Python.

__main__.py   the command line
prompts.py      prompts from a file
searching.py  search_alpha(): sample, score, compare, write down
settings.py     what it is asked for, checked
probing.py      which alpha to try next, for "auto"
models.py       models and tokenizers, loaded
judging.py      the model that is judged, which is the one that the merge writes
sampling.py     replies as the paper samples them, each from a random stream of its own
rewards.py      what a reply is worth: a reward model, or a function
replies.py      the folder in which a search goes on
ranking.py      which alpha is best, how sure that is, and what has broken down
plots.py        the picture
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .judging import check_merge
    from .searching import SearchResult, search_alpha

__all__ = ["SearchResult", "check_merge", "search_alpha"]


def __getattr__(name: str) -> Any:
    if name == "check_merge":  # with torch and transformers
        from . import judging

        return judging.check_merge
    if name in __all__:  # with NumPy
        from . import searching

        return getattr(searching, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
