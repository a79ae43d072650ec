"""What a source holds: were these to fail, data would be judged by wrong figures, or a page run a stranger's code."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from triscale.data.samples import BadSample, Sample
from triscale.data.scenes import Scenes
from triscale.data.stats import SHOWN_BAD, Statistics, measure
from triscale.data.stats_page import stats_page, summary
from triscale.data.text import SentencePieceTokenizer, train_tokenizer
from triscale.errors import RunError
from triscale.pages.html import policy
from triscale.pages.style import STYLE


class Listed:
    """A source of given samples; an exception in the list is raised when it is read."""

    def __init__(self, samples: list[Sample | Exception], name: str = "listed") -> None:
        self.samples = samples
        self.name = name
        self.skipped = [("k", "key-duplicate"), ("l", "key-duplicate")]

    def __len__(self) -> int:
        return len(self.samples)

    def file(self, index: int) -> str:
        return self.name

    def read(self, index: int, *, image: bool = True) -> Sample:
        sample = self.samples[index]
        if isinstance(sample, Exception):
            raise sample
        return sample


def png(seed: int, width: int, height: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def some() -> Listed:
    return Listed(
        [
            Sample(key="a", image=png(0, 10, 20), text=b"one two\nthree"),
            Sample(key="b", image=png(1, 30, 40), text=b"ONE  two", label=b"1"),
            Sample(key="c", image=png(0, 10, 20), text=b"four"),
            Sample(key="d", image=png(2, 30, 40)[:-30], text=b"five"),
            Sample(key="e", image=b"GIF89a", text=b"six"),
            Sample(key="f", image=png(3, 5, 5), text=b"\xff"),
            BadSample("image-missing", "g"),
        ]
    )


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_tokenizer(["one two", "three", "four"] * 10, 30), 4)


def test_the_figures_are_those_of_the_samples(tokenizer: SentencePieceTokenizer) -> None:
    found = measure(some(), tokenizer=tokenizer)
    assert (found.length, found.samples, found.labelled) == (7, 7, 1)
    assert found.bad == {"image-truncated": 1, "image-unreadable": 1, "caption-not-utf8": 1, "image-missing": 1}
    assert found.listed[0] == ("d", "image-truncated") and found.listed[-1] == ("g", "image-missing")
    assert found.unused == {"key-duplicate": 2}
    assert found.captions.tolist() == [2, 1, 1]
    assert found.characters.tolist() == [7, 5, 7, 4]
    assert found.sizes.tolist() == [[10, 20], [30, 40], [10, 20]]
    assert (found.duplicate_images, found.duplicate_captions) == (1, 1)
    expected = [len(tokenizer._processor.encode(text)) + 1 for text in ("one two", "three", "ONE two", "four")]
    assert found.tokens.tolist() == expected and found.truncated == sum(count > 4 for count in expected) > 0
    values = json.loads(json.dumps(found.values()))
    assert values["bad_fraction"] == pytest.approx(4 / 7) and values["duplicate_image_fraction"] == pytest.approx(1 / 3)
    assert values["image_width"]["p100"] == 30 and values["truncated_fraction"] == found.truncated / 4


def test_a_caption_that_encode_cuts_is_one_that_counts_as_cut(tokenizer: SentencePieceTokenizer) -> None:
    texts = ["one", "one two three", "four " * 9, "t", ""]
    for text, count, row in zip(texts, tokenizer.count(texts), tokenizer.encode(texts), strict=True):
        longer = SentencePieceTokenizer(tokenizer.content, 60).encode([text])[0]
        assert (count > tokenizer.length) == (np.count_nonzero(longer) > np.count_nonzero(row))


def assert_equal(a: Statistics, b: Statistics) -> None:
    assert a.values() == b.values() and a.listed == b.listed


def test_workers_find_the_same_and_so_does_a_second_time() -> None:
    source = Scenes("train", samples=300)
    alone = measure(source)
    assert alone.samples == 300 and alone.bad == {} and alone.labelled == 300
    assert_equal(measure(source, workers=2), alone)
    assert len(alone.file_bytes) == 0, "pixels are no files"


def test_fewer_samples_are_spread_evenly_over_the_source() -> None:
    source = Listed([Sample(key=str(i), image=b"", text=b"x") for i in range(1000)])
    found = measure(source, samples=10)
    assert found.samples == 10 and [key for key, _ in found.listed] == [str(i * 100) for i in range(10)]


def test_only_the_first_bad_samples_are_listed_and_all_are_counted() -> None:
    found = measure(Listed([BadSample("image-empty", str(i)) for i in range(500)]))
    assert len(found.listed) == SHOWN_BAD and found.bad == {"image-empty": 500}
    assert "image-empty" in stats_page(found)


def test_a_read_that_fails_ends_it_in_one_line() -> None:
    with pytest.raises(RunError, match="listed: sample #1 cannot be read: gone"):
        measure(Listed([some().samples[0], OSError("gone")]))


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


EVIL = "<script>alert(1)</script>\"'&\x1b[31m\u202e" + "x" * 500


def test_the_page_escapes_what_comes_from_the_data_and_loads_nothing(tokenizer: SentencePieceTokenizer) -> None:
    source = Listed([*some().samples, BadSample("image-missing", EVIL)], name=EVIL)
    page = stats_page(measure(source, tokenizer=tokenizer))
    tags = Tags()
    tags.feed(page)
    assert not {tag for tag, _ in tags.tags} & {"script", "img", "iframe", "object", "form", "base"}
    assert [attributes["content"] for tag, attributes in tags.tags if "http-equiv" in attributes] == [policy(STYLE)]
    assert sum(tag == "svg" for tag, _ in tags.tags) >= 4 and "&lt;script&gt;" in page
    assert "\x1b" not in page and "\u202e" not in page and "x" * 400 not in page
    assert not re.search(r"https?://(?!www.w3.org/2000/svg)|url\(|@import", page)


def test_a_page_of_nothing_good_and_a_summary_without_captions_are_whole() -> None:
    nothing = measure(Listed([BadSample("image-empty", "a")]))
    assert "image-empty" in stats_page(nothing) and "<svg" not in stats_page(nothing)
    assert dict(summary(nothing))["bad"] == "1 (100.00%)"
