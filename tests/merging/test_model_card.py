"""The model card: the fields that the Hub reads, the text that a person reads, and names that could break either."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

import expo
from expo.checkpoints.checkpoint import Origin
from expo.merging.model_card import CardFacts, card_text
from expo.merging.result import Output

HUB_ID = re.compile(
    r"(?!.*(--|\.\.))[A-Za-z0-9_]([\w.-]*[A-Za-z0-9_])?(/[A-Za-z0-9_]([\w.-]*[A-Za-z0-9_])?)?", re.ASCII
)
HOSTILE = [
    "a|b",
    "a\nb",
    "---",
    "\n---\nlicense: mit\n---\n",
    "`",
    "a```b````c",
    " x ",
    "*a*_b_[c](http://d)<script>",
    "# a",
    "",
    "/",
    "..",
    "a--b..c",
    "-x.git",
    "\udc80\udcff",
    "a\x00\x07\x1b[31mb",
    "\u202eabc\u2028def",
    "x" * 300,
    "中文 模型",
    "{{ jinja }}",
    "a: b #c",
    "!!python/object:os.system",
    "'\"\\",
]


def make(**changes: Any) -> str:
    """Return the card of an ordinary merge with these changes."""
    arguments: dict[str, Any] = {
        "sft": Origin("HuggingFaceH4/mistral-7b-sft-beta", "1" * 40),
        "aligned": Origin("HuggingFaceH4/zephyr-7b-beta", "2" * 40),
        "alpha": 0.1,
        "rules": {},
        "options": {},
        "command": "python -m expo.fast --sft A --aligned B --alpha 0.1",
        "name": "zephyr-7b-beta-expo-0.1",
        "readme": None,
        "output": Output("/somewhere/out", 0.1, 0.61234, 0.00123456, 0),
        "relative_distance": 0.0123456,
        "max_abs_difference": 0.03125,
        "extrapolated": 291,
        "copied": [],
        "dropped": [],
        "dtype": "BF16",
        "tokenizer": True,
        "code": False,
        "auto_class": "AutoModelForCausalLM",
    }
    return card_text(CardFacts(**(arguments | changes)))


def split(text: str) -> tuple[dict[str, Any], str]:
    """Return the front matter and the body, split as the Hub splits them."""
    match = re.search(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))", text)
    assert match
    fields = yaml.safe_load(match[2])
    assert isinstance(fields, dict)
    return fields, text[match.end() :]


def front(**changes: Any) -> dict[str, Any]:
    return split(make(**changes))[0]


def body(**changes: Any) -> str:
    return split(make(**changes))[1]


def with_matter(matter: str) -> dict[str, Any]:
    """Return the front matter of the output of an aligned with this front matter."""
    return front(readme=f"---\n{matter}\n---\n# A model\n")


def test_front_matter() -> None:
    assert front() == {
        "base_model": ["HuggingFaceH4/zephyr-7b-beta", "HuggingFaceH4/mistral-7b-sft-beta"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "expo"],
    }
    assert make().startswith("---\nbase_model:\n- HuggingFaceH4/zephyr-7b-beta\n")


def test_the_hub_library_reads_it() -> None:
    hub = pytest.importorskip("huggingface_hub")
    read = hub.ModelCard(make(readme="---\nlicense: mit\nlanguage:\n- en\npipeline_tag: text-generation\n---\n"))
    assert read.data.base_model == ["HuggingFaceH4/zephyr-7b-beta", "HuggingFaceH4/mistral-7b-sft-beta"]
    assert read.data.to_dict()["base_model_relation"] == "merge"
    assert (read.data.license, read.data.language, read.data.pipeline_tag) == ("mit", ["en"], "text-generation")
    assert (read.data.library_name, read.data.tags) == ("transformers", ["merge", "expo"])
    assert read.text.lstrip().startswith("# zephyr-7b-beta-expo-0.1\n")


def test_body_says_what_was_done() -> None:
    text = body(rules={"embed_tokens": 0.0, r"layers\.(1|2)\.": 0.25}, options={"--on-unpaired": "aligned"})
    for line in (
        "# zephyr-7b-beta-expo-0.1",
        "    out = aligned + alpha * (aligned - sft), alpha = 0.1",
        "- alpha: 0.1",
        "- alpha of tensors that match `embed_tokens`: 0",
        r"- alpha of tensors that match `layers\.(1|2)\.`: 0.25",
        "- `--on-unpaired`: `aligned`",
        "- dtype: BF16",
        "```console\n$ python -m expo.fast --sft A --aligned B --alpha 0.1\n```",
        "- elements changed: 61.23%",
        "- norm of the change, relative to aligned's: 0.001235",
        "- norm of aligned - sft, relative to aligned's: 0.01235",
        "- largest element of |aligned - sft|: 0.03125",
        "- elements that are inf or NaN: 0",
        "- tensors: 291 extrapolated, 0 copied, 0 dropped",
    ):
        assert f"\n{line}\n" in f"\n{text}\n", line
    assert f"- made with expo {expo.__version__}, Python 3." in text
    assert "Model Extrapolation Expedites Alignment" in text
    assert "https://arxiv.org/abs/2404.16792" in text
    assert "/somewhere" not in text


def test_the_usage_is_python() -> None:
    for name in ("merged", *HOSTILE):
        code = re.search(r"^(`{3,})python\n(.*?)\n\1$", body(name=name), re.DOTALL | re.MULTILINE)
        assert code
        compile(code[2], "usage", "exec")
        line = next(line for line in code[2].splitlines() if line.startswith("name = "))
        found: dict[str, str] = {}
        exec(line, found)
        assert found["name"] == name


def test_links_lead_to_the_commit_of_a_hub_id_and_of_nothing_else() -> None:
    commit = "2" * 40
    linked = f"[`org/name`](https://huggingface.co/org/name/tree/{commit}), commit `{commit}`"
    assert f"- aligned: {linked}\n" in body(aligned=Origin("org/name", commit))
    assert "- aligned: `org/name`\n" in body(aligned=Origin("org/name", None))
    assert f"- aligned: `name`, commit `{commit}`\n" in body(aligned=Origin("name", commit))
    assert "- aligned: `a/b/c`, commit `1`\n" in body(aligned=Origin("a/b/c", "1"))
    assert "- aligned: `org/name`, commit `](x`\n" in body(aligned=Origin("org/name", "](x"))


def test_the_usage_is_of_what_is_there() -> None:
    plain = body()
    assert "from transformers import AutoModelForCausalLM, AutoTokenizer\n" in plain
    assert "AutoTokenizer.from_pretrained" in plain
    assert "trust_remote_code" not in plain
    assert "Pass `trust_remote_code=True` to both calls" in body(code=True)
    without = body(tokenizer=False)
    assert "from transformers import AutoModelForCausalLM\n" in without
    assert "AutoTokenizer" not in without
    assert "This folder has no tokenizer, because aligned has none" in without
    assert "Pass `trust_remote_code=True` to the call" in body(tokenizer=False, code=True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/name", "org/name"),
        ("internlm/internlm2-chat-1_8b", "internlm/internlm2-chat-1_8b"),
        ("gpt2", "gpt2"),
        ("my model (final)", "my-model-final"),
        ("a|b\nc", "a-b-c"),
        ("--x..y--.git", "x.y"),
        ("a/b/c", "c"),
        ("folder/", "folder"),
        ("模型", "unnamed"),
        ("", "unnamed"),
        ("..", "unnamed"),
        ("y" * 200, "y" * 96),
    ],
)
def test_base_model_is_an_id(name: str, expected: str) -> None:
    assert front(aligned=Origin(name, None))["base_model"] == [expected, "HuggingFaceH4/mistral-7b-sft-beta"]


def test_two_folders_of_one_name_are_listed_once() -> None:
    assert front(aligned=Origin("model", None), sft=Origin("model", None))["base_model"] == ["model"]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_breaks_the_card(name: str) -> None:
    hub = pytest.importorskip("huggingface_hub")
    text = make(
        sft=Origin(name, name),
        aligned=Origin(f"x{name}", name),
        rules={name: 0.5},
        options={name: name},
        command=f"expo {name}",
        name=name,
        readme=f"---\nlicense: mit\npipeline_tag: {name}\n---\n{name}",
        copied=[(name, name)],
        dropped=[(name, name)],
        dtype=name,
    )
    text.encode("utf-8")
    fields, rest = split(text)
    assert fields["base_model_relation"] == "merge"
    assert fields["tags"] == ["merge", "expo"]
    assert fields.get("license") in ("mit", None)
    for model in fields["base_model"]:
        assert HUB_ID.fullmatch(model), model
        assert len(model) <= 96
        hub.utils.validate_repo_id(model)
    assert hub.ModelCard(text).data.to_dict()["base_model"] == fields["base_model"]
    headings = [line for line in _outside_fences(rest) if line.startswith("#")]
    assert [line for line in headings if line.startswith("## ")] == [
        "## How it was made",
        "## How much the weights changed",
        "## How to use it",
        "## Citation",
    ]
    assert len(headings) == 5
    assert "<script" not in re.sub(r"(`+).*?\1", "", rest.replace("\\<", ""), flags=re.DOTALL)


def _outside_fences(text: str) -> list[str]:
    """Return the lines outside the blocks of code."""
    lines, fence = [], ""
    for line in re.split(r"\r\n|\r|\n", text):
        if fence:
            fence = "" if line == fence else fence
        elif line.startswith("```"):
            fence = line.rstrip("abcdefghijklmnopqrstuvwxyz")
        else:
            lines.append(line)
    assert not fence
    return lines


def test_backticks_in_code_get_longer_ones_around_them() -> None:
    assert "- aligned: ```a``b`c```\n" in body(aligned=Origin("a``b`c", None))
    assert "- aligned: `` `a` ``\n" in body(aligned=Origin("`a`", None))
    assert "\n````console\n$ expo '```'\n````\n" in body(command="expo '```'")


def test_the_first_eight_are_named_and_the_rest_counted() -> None:
    copied = [(f"model.layers.{k}.weight", "alpha is 0") for k in range(11)]
    text = body(copied=copied, dropped=[("lm_head.weight", "only in sft")])
    assert text.count("- copied: `model.layers.") == 8
    assert "- copied: `model.layers.7.weight` (alpha is 0)\n- copied: 3 more\n" in text
    assert "- dropped: `lm_head.weight` (only in sft)\n" in text
    assert "- tensors: 291 extrapolated, 11 copied, 1 dropped\n" in text
    assert "more" not in body(copied=copied[:8])


def test_same_arguments_same_bytes() -> None:
    readme = "---\nlicense: mit\nlanguage: [en, de]\n---\n"
    assert make(readme=readme) == make(readme=readme)
    assert make(readme=readme).endswith(".\n")
    assert "\r" not in make()


def test_numbers_that_are_not_finite_or_not_plain() -> None:
    output = Output("x", -1.0, 0.0, float("inf"), 7)
    text = body(alpha=-1e-5, output=output, relative_distance=float("nan"), max_abs_difference=float("inf"))
    assert "alpha = -1e-05\n" in text
    assert "relative to aligned's: inf\n" in text
    assert "relative to aligned's: nan\n" in text
    assert "inf or NaN: 7\n" in text
    assert "- alpha: 2\n" in body(alpha=2)


@pytest.mark.parametrize(
    ("matter", "taken"),
    [
        ("license: mit", {"license": "mit"}),
        ("license: Apache-2.0", {"license": "apache-2.0"}),
        ("license: [mit, apache-2.0]", {"license": ["mit", "apache-2.0"]}),
        (
            "license: other\nlicense_name: ai2-impact-license-low-risk\nlicense_link: https://allenai.org/impact-license",
            {
                "license": "other",
                "license_name": "ai2-impact-license-low-risk",
                "license_link": "https://allenai.org/impact-license",
            },
        ),
        ("license: other", {"license": "other"}),
        ("license: My Own (v2)", {"license": "other", "license_name": "my-own-v2"}),
        ("license: mit\nlicense_name: ignored", {"license": "mit"}),
        ("license_link: alone", {}),
        ("language: en", {"language": "en"}),
        ("language:\n- en\n- no", {"language": ["en", "no"]}),
        ("language: no", {"language": "no"}),
        ("pipeline_tag: text-generation", {"pipeline_tag": "text-generation"}),
        (
            "license: mit\nmodel-index: [{name: x}]\ntags: [dpo]\nbase_model: a/b\nlibrary_name: peft",
            {"license": "mit"},
        ),
        ("license: 3\nlanguage: {a: b}\npipeline_tag: [x]", {}),
        ("license: null\nlanguage: []\npipeline_tag: ''", {}),
        ("language: [en, [de]]", {}),
        ('license: "a\\n---\\nb"\npipeline_tag: "x\\ny"', {}),
        (f"license: {'x' * 5000}", {}),
    ],
)
def test_what_is_taken_over_from_aligned(matter: str, taken: dict[str, Any]) -> None:
    fields = with_matter(matter)
    assert {key: value for key, value in fields.items() if key not in front()} == taken
    assert {key: fields[key] for key in front()} == front()


@pytest.mark.parametrize(
    "matter",
    [
        "- a list",
        "a string",
        "license: [mit",
        "license: mit\n\tlanguage: en",
        "? {a: b}\n: c\nlicense: : :",
        "license: !!python/object/apply:os.system [true]",
        "license: !!bool maybe",
        "license: !!int ''",
        "date: !!timestamp never",
        "date: 2024-13-45",
        "license: \x00",
        "a: &a [x, x]\nlicense: mit\nb: [*a, *a]",
        "[" * 5000,
        "<<: 1\nlicense: mit\n? []",
    ],
)
def test_front_matter_that_cannot_be_read_counts_as_none(matter: str) -> None:
    assert with_matter(matter) == front()


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        ("---\r\nlicense: mit\r\n---\r\n# x", "mit"),
        ("\ufeff---\nlicense: mit\n---", "mit"),
        ("\n\n---\nlicense: mit\n---  \n", "mit"),
        ("# x\n---\nlicense: mit\n---\n", None),
        ("---\nlicense: mit\n", None),
        ("---license: mit\n---\n", None),
        ("", None),
        ("---\n---\n", None),
    ],
)
def test_where_front_matter_is_found(readme: str, licence: str | None) -> None:
    assert front(readme=readme).get("license") == licence


def test_a_long_line_is_not_folded() -> None:
    link = "https://example.org/" + " --- " * 50
    fields = with_matter(f"license: other\nlicense_name: x\nlicense_link: '{link}'")
    assert fields["license_link"] == link


def test_text_that_is_not_ascii_stays_as_it_is() -> None:
    assert "license_name: 许可证\n" in make(readme="---\nlicense: other\nlicense_name: 许可证\n---\n")
    assert "# 模型\n" in make(name="模型")
