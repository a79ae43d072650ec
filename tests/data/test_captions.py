"""Captions: what is drawn from a sample's sidecars, and what makes the sample a bad one."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from triscale.data.captions import (
    MAX_CAPTION_BYTES,
    MAX_METADATA_BYTES,
    CaptionRules,
    all_captions,
    choose_caption,
    fill_template,
    read_label,
    sample_id,
)
from triscale.data.samples import BadSample, Sample


def sample(text: bytes | None = None, metadata: object = None, label: bytes | None = None) -> Sample:
    raw = metadata if isinstance(metadata, bytes) or metadata is None else json.dumps(metadata).encode()
    return Sample(key="k", image=b"", text=text, metadata=raw, label=label)


def draws(one: Sample, fields: tuple[str, ...], number: int = 2000, part_dropout: float = 0.0) -> Counter[str]:
    rng = np.random.default_rng(0)
    rules = CaptionRules(fields=fields, part_dropout=part_dropout)
    return Counter(choose_caption(one, rules, rng) for _ in range(number))


def test_each_line_of_a_text_and_each_string_of_a_list_is_a_candidate():
    one = sample(b"a cat\n\n  a  dog \r\n", {"title": "a fox", "tags": ["red", "", 3, "blue"], "n": 4, "none": None})
    fields = ("txt", "json:title", "json:tags", "json:n", "json:none", "json:absent")
    assert all_captions(one, fields) == ["a cat", "a dog", "a fox", "red", "blue"]


def test_a_field_is_drawn_uniformly_before_its_candidates():
    drawn = draws(sample(b"a\nb\nc", {"title": "d"}), ("txt", "json:title", "json:absent"), number=6000)
    assert set(drawn) == set("abcd")
    assert abs(drawn["d"] - 3000) < 200  # would be 1,500 if candidates were drawn alike
    assert all(abs(drawn[letter] - 1000) < 150 for letter in "abc")


def test_part_dropout_never_drops_the_first_part_and_drops_others_at_its_rate():
    drawn = draws(sample(b"cat, animal, pet"), ("txt",), number=4000, part_dropout=0.25)
    assert set(drawn) == {"cat", "cat, animal", "cat, pet", "cat, animal, pet"}
    assert abs(drawn["cat, animal, pet"] / 4000 - 0.75**2) < 0.03
    assert draws(sample(b"cat, animal, pet"), ("txt",), number=50, part_dropout=1.0) == {"cat": 50}


@pytest.mark.parametrize("text", [b", cat", b"cat,", b",", b",,cat,,"])
def test_part_dropout_never_leaves_an_empty_caption(text: bytes):
    assert all(caption.strip() for caption in draws(sample(text), ("txt",), number=100, part_dropout=1.0))


def test_a_caption_is_a_function_of_its_generator_alone():
    one = sample(b"a, b, c\nd, e, f")
    first, second = (draws(one, ("txt",), number=50, part_dropout=0.5) for _ in range(2))
    assert first == second


def test_templates_are_filled_literally_so_that_braces_in_captions_are_harmless():
    rng = np.random.default_rng(0)
    filled = {fill_template("{0} {c.__class__}", ("a {c}.", "the {c}!"), rng) for _ in range(50)}
    assert filled == {"a {0} {c.__class__}.", "the {0} {c.__class__}!"}
    assert fill_template("as it is", (), rng) == "as it is"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"\xef\xbb\xbfa cat", "a cat"),
        (b"a\x00b\x1b[31mred", "ab[31mred"),
        (b"\xc2\x9bcat\x7f", "cat"),
        ("Straße 日本 😀".encode(), "Straße 日本 😀"),
    ],
)
def test_byte_order_marks_and_control_characters_are_stripped(text: bytes, expected: str):
    assert all_captions(sample(text), ("txt",)) == [expected]


def test_a_lone_surrogate_in_json_does_not_reach_the_tokenizer():
    assert all_captions(sample(metadata=b'{"title": "a \\ud800 cat"}'), ("json:title",)) == ["a cat"]


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (sample(), "caption-missing"),
        (sample(metadata={"other": "x"}), "caption-missing"),
        (sample(metadata={"title": 3}), "caption-missing"),
        (sample(b""), "caption-empty"),
        (sample(b" \n\x00\t\n"), "caption-empty"),
        (sample(metadata={"title": []}), "caption-empty"),
        (sample(b"caf\xe9"), "caption-not-utf8"),
        (sample(b"x" * (MAX_CAPTION_BYTES + 1)), "caption-too-long"),
        (sample(metadata={"title": "x" * (MAX_CAPTION_BYTES + 1)}), "caption-too-long"),
        (sample(metadata=b"{"), "metadata-not-json"),
        (sample(metadata=b"[1]"), "metadata-not-json"),
        (sample(metadata=b'{"title": "\xff"}'), "metadata-not-json"),
        (sample(metadata=b"[" * 100_000), "metadata-not-json"),
        (sample(metadata=b'{"n": ' + b"9" * 10_000 + b"}"), "metadata-not-json"),
        (sample(metadata=b" " * (MAX_METADATA_BYTES + 1)), "metadata-too-large"),
    ],
)
def test_what_is_wrong_with_a_caption_has_a_reason(one: Sample, reason: str):
    with pytest.raises(BadSample) as caught:
        choose_caption(one, CaptionRules(fields=("txt", "json:title")), np.random.default_rng(0))
    assert caught.value.reason == reason


def test_a_bad_field_makes_the_sample_bad_whichever_field_is_drawn():
    one = sample(b"caf\xe9", {"title": "good"})
    for seed in range(8):
        with pytest.raises(BadSample, match="caption-not-utf8"):
            choose_caption(one, CaptionRules(fields=("txt", "json:title")), np.random.default_rng(seed))


def test_the_sidecar_that_no_field_names_is_not_read():
    assert all_captions(sample(b"a cat", b"{"), ("txt",)) == ["a cat"]


@pytest.mark.parametrize("label", [b"", b"a", b"-1", b"1.5", b"1" * 19, b"1" + b" " * 100 + b"x", b"1 " * 10_000])
def test_a_label_that_is_no_number_is_named(label: bytes):
    with pytest.raises(BadSample, match="label-not-a-number"):
        read_label(sample(label=label))


def test_ids_are_equal_exactly_for_positives():
    one = sample(b"a cat", label=b" 17\n")
    nothing, labels, captions = (CaptionRules(ids=ids) for ids in ("none", "label", "caption"))
    assert sample_id(one, nothing, "a cat") == -1
    assert sample_id(one, labels, "a cat") == sample_id(sample(label=b"017"), labels, "a dog")
    cats = {sample_id(one, captions, caption) for caption in ("a cat", "A  Cat", " a cat ")}
    assert len(cats) == 1
    assert 0 <= min(cats) < 2**63
    assert sample_id(one, captions, "a dog") not in cats
    with pytest.raises(BadSample, match="label-missing"):
        sample_id(sample(b"a cat"), labels, "a cat")


def test_ids_of_two_sources_are_equal_where_they_mean_the_same_and_only_there():
    one = sample(b"a cat", label=b"3")
    first, second = CaptionRules(ids="label"), CaptionRules(ids="label", source=1)
    assert sample_id(one, first, "a cat") != sample_id(one, second, "a cat")
    first, second = CaptionRules(ids="caption"), CaptionRules(ids="caption", source=1)
    assert sample_id(one, first, "a cat") == sample_id(one, second, "A cat")


def test_the_class_of_a_sample_is_a_caption_where_the_classes_have_names():
    one = sample(b"a photograph", label=b"1")
    names = ("a cat", "a dog")
    assert all_captions(one, ("cls",), names) == ["a dog"]
    assert all_captions(one, ("cls", "txt"), names) == ["a dog", "a photograph"]
    assert all_captions(one, ("cls", "txt")) == ["a photograph"]
    rules = CaptionRules(fields=("cls",), classnames=names)
    assert choose_caption(one, rules, np.random.default_rng(0)) == "a dog"


@pytest.mark.parametrize(
    ("label", "reason"), [(None, "label-missing"), (b"x", "label-not-a-number"), (b"2", "label-unknown")]
)
def test_a_class_without_a_name_makes_the_sample_bad(label: bytes | None, reason: str):
    with pytest.raises(BadSample, match=reason):
        all_captions(sample(b"a cat", label=label), ("cls", "txt"), ("a cat", "a dog"))
