"""Find the alpha whose replies a reward scores best: python -m expo.search, and search_alpha() in Python.

__main__.py         the command line
alpha_search.py     search_alpha(): sample, score and compare, alpha by alpha
settings.py         the arguments, checked
prompts.py          prompts from a file
probing.py          the choice of the next alpha, for "auto"
search_models.py    the inputs of a search, and its models, loaded at their first use
models.py           models and tokenizers, loaded with transformers
judged_model.py     the model that is judged: at each alpha, the one that the merge writes
step_comparison.py  the comparison that proves, before the first reply, that the judged model is the merge's
merge_check.py      the comparison of a merge with the judged model, weight by weight
sampling.py         replies, sampled with the paper's settings
rewards.py          their rewards: a reward model, or a function
replies.py          the folder that stores them
ranking.py          the best alpha, its errors, and signs of too large an alpha
results.py          the result, and its files
plots.py            the picture
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .alpha_search import search_alpha
    from .merge_check import check_merge
    from .results import SearchResult

__all__ = ["SearchResult", "check_merge", "search_alpha"]

# The module of each public name. merge_check imports torch and transformers, and the others import NumPy.
_MODULES = {"SearchResult": "results", "check_merge": "merge_check", "search_alpha": "alpha_search"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
