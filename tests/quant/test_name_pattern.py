"""Name patterns of untrusted configs: `re.match` for what configs use, and no pattern that takes long."""

from __future__ import annotations

import re
import time
import warnings

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparsevila.errors import UnsupportedModel
from sparsevila.quant.name_pattern import NamePattern

NAMES = st.lists(
    st.sampled_from(["model", "layers", "0", "11", "mlp", "up_proj", "q_proj", ".", "visual", "a", "-", "\n"]),
    max_size=7,
).map("".join)
ATOMS = st.sampled_from(
    ["model", "layers", "_proj", "p", "0", r"\.", ".", ".*", ".+", r"\d", r"\d+", r"\w*", "[a-z]+", "[^.]*", "[0-9_.-]",
     "q?", "1*", "a+?", "^", "$", r"\-"]
)  # fmt: skip


def joined(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(parts, max_size=4).map("".join)


PATTERNS = st.recursive(
    joined(ATOMS),
    lambda inner: (
        joined(st.builds("({}){}".format, inner, st.sampled_from(["", "?"])) | inner)
        | st.lists(inner, min_size=2, max_size=3).map("|".join)
        | st.builds("(?:{})".format, inner)
    ),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(PATTERNS, NAMES)
@example(".*(q|k|v|o)_proj$", "model.layers.0.q_proj")
@example("(a|b)?c|d", "d")
@example(".*_proj", "q_proj.weight")
def test_patterns_match_as_re_does(pattern: str, name: str) -> None:
    try:
        ours = NamePattern(f"re:{pattern}")
    except UnsupportedModel:
        return
    name = name.rstrip("\n")  # `$` of re also stands before a last line break, which no name has
    assert ours.matches(name) == (re.match(pattern, name) is not None)


@pytest.mark.parametrize(
    "pattern", [".*", "", "a|", "(?:(a))", r"\.\-", "[^]", "a]", "a}", "^^a", "a$b", "[a-]", r"[\d.]", r"[\w]+"]
)
def test_corners_that_are_understood_mean_what_re_means(pattern: str) -> None:
    try:
        expected = re.compile(pattern)
    except re.error:
        with pytest.raises(UnsupportedModel):
            NamePattern(f"re:{pattern}")
        return
    for name in ("", "a", ".-", "ab", "a]", "a}", "-", "]", "0.", "a$b"):
        assert NamePattern(f"re:{pattern}").matches(name) == (expected.match(name) is not None), name


def test_a_plain_entry_is_the_whole_name() -> None:
    assert NamePattern("lm_head").matches("lm_head")
    assert not NamePattern("lm_head").matches("language_model.lm_head")
    assert not NamePattern("lm.head").matches("lm_head")
    assert not NamePattern("re:head").matches("lm_head")


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(a+)+$", "repeat '+'"),
        ("(a|b)*", "repeat '*'"),
        ("a{1,9}", "repeat '{'"),
        ("{", "repeat '{'"),
        ("*", "repeat '*'"),
        ("a**", "repeat '*'"),
        ("a*+", "repeat '*'"),
        ("(?=a)", "a group that begins"),
        ("(?i)a", "a group that begins"),
        ("(?P<x>a)", "a group that begins"),
        (r"(a)\1", r"escape '\1'"),
        (r"\bmlp", r"escape '\b'"),
        (r"\s", r"escape '\s'"),
        ("(a", "unmatched bracket"),
        ("a)", "unmatched bracket"),
        ("[a", "an end"),
        ("[]a]", "an empty set"),
        ("a\\", "an end"),
        ("[b-a]", "range"),
        ("[[:alpha:]]", "a bracket in a set"),
        ("(" * 9 + ")" * 9, "8 brackets"),
        ("a" * 300, "256"),
    ],
)
def test_everything_else_is_refused_by_name(pattern: str, said: str) -> None:
    with pytest.raises(UnsupportedModel, match="name pattern 're:") as caught:
        NamePattern(f"re:{pattern}")
    assert said in str(caught.value)
    assert len(str(caught.value)) < 200


def test_a_pattern_that_takes_re_minutes_is_quick() -> None:
    pattern, name = "a?" * 60 + "a" * 60 + "b", "a" * 60
    start = time.process_time()
    assert not NamePattern(f"re:{pattern}").matches(name)
    assert not NamePattern("re:" + ".*a" * 80 + "$x").matches("a" * 200)
    assert time.process_time() - start < 2
    short = re.compile("a?" * 14 + "a" * 14 + "b")  # each further pair doubles what re needs
    assert not short.match("a" * 14)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert NamePattern("re:" + ".*layers.*").matches("model.layers.0")
