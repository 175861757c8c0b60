"""Hints about names of inputs: a `~` that no shell has expanded, an address of the hub, a folder named as a hub id."""

from __future__ import annotations

import os
import re
import shlex
from urllib.parse import unquote, urlsplit

from ..checkpoints.files import ADAPTER_CONFIG, WHOLE_MODELS
from .hub_ids import HubId, parse_hub_id

_HOSTS = {"huggingface.co", "www.huggingface.co", "hf.co"}
_NO_MODELS = {"datasets", "spaces", "docs", "blog", "papers", "collections"}  # the first part of other addresses
_REPO = r"([^/?#@]+/[^/?#@]+?)(?:\.git)?"
_REVISION = r"(refs/[^/?#]+/[^/?#]+|[^/?#]+)"
_PAGE = re.compile(
    rf"(?:(?i:https?)://)?([^/\s]+\.[^/\s]+|[^/\s]+:\d+)/{_REPO}"
    rf"(?:/(?:tree|blob|resolve|raw|commits?)/{_REVISION})?(?:[/?#].*)?"
)
_SCHEME = re.compile(rf"hf://(?:models/)?{_REPO}(?:@{_REVISION})?(?:/.*)?")


def explain_missing(name: str) -> str | None:
    """Return how to write a name that is neither a path nor a hub id; None if it looks like no known mistake."""
    if name.startswith("~"):
        path = os.path.expanduser(name)
        if path == name:
            return None
        if os.path.exists(path):
            return f"the shell expands ~ only at the start of a word without quotes: write {shlex.quote(path)}"
        return f"no shell has expanded the ~, and {path} does not exist either"
    hub_id = parse_address(name)
    if hub_id is None:
        return None
    return f"the address of a repository on the hub, for which you write its id: {hub_id.typed}"


def parse_address(text: str) -> HubId | None:
    """Return the repository and the revision that an address of the hub names; None for any other text.

    An address is that of a repository, of a branch or of a file (`https://huggingface.co/org/name/blob/main/file`), or
    of huggingface_hub's filesystem (`hf://org/name@revision`).
    """
    page, scheme = _PAGE.fullmatch(text), _SCHEME.fullmatch(text)
    if page is not None:
        endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc
        if page[1].lower() not in _HOSTS | {endpoint.lower()} or page[2].partition("/")[0] in _NO_MODELS:
            return None
    found = (page[2], page[3]) if page else (scheme[1], scheme[2]) if scheme else None
    if found is None:
        return None
    repo, revision = found
    return parse_hub_id(repo if revision in (None, "main") else f"{repo}@{unquote(revision)}")


def hidden_by_folder(name: str) -> HubId | None:
    """Return the repository that a name would mean if no folder had this name; None if it would mean none."""
    return parse_hub_id(name) if os.path.isdir(name) else None


def explain_hidden(name: str, hub_id: HubId) -> str | None:
    """Return a sentence about the hub's repository if a folder of the same name has no weights; None if it has some."""
    if any(os.path.lexists(os.path.join(name, file)) for file in (*WHOLE_MODELS, ADAPTER_CONFIG)):
        return None
    return f"a folder takes precedence over the hub: if you mean the repository there, write {hub_id}"


def note_hidden(name: str, hub_id: HubId) -> str | None:
    """Return a note about a folder that is used though the hub has a repository of its name; None if that is unknown.

    The repository is known if the hub's cache has it, or if a recipe names it. Without this condition a merge of
    `models/sft` would have the note too.
    """
    from .recipes import recipes

    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    in_cache = os.path.isdir(os.path.join(cache, f"models--{hub_id.repo.replace('/', '--')}"))
    if not in_cache and not any(hub_id.repo in (one.sft, one.aligned) for one in recipes()):
        return None
    return f"{name} is a folder here, and it is used; the hub has a repository of this name, which is {hub_id}"
