"""CSV files: were these to fail, a row would be read as another, or one wrong quote would cost the file."""

from __future__ import annotations

import csv
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triscale.data.csv_rows import CsvSource
from triscale.data.samples import BadSample, Sample
from triscale.errors import UsageError


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def texts(source: CsvSource) -> list[bytes | None]:
    return [source.read(index, image=False).text for index in range(len(source))]


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.csv", "\t"), ("a.csv", ";"), ("a.tsv", "\t")])
def test_open_clips_columns_are_found_under_any_separator(tmp_path: Path, name: str, separator: str) -> None:
    (tmp_path / "x.jpg").write_bytes(b"picture")
    lines = [separator.join(("filepath", "title")), separator.join(("x.jpg", "a word")), ""]
    source = CsvSource("pairs", [write(tmp_path / name, "\n".join(lines))], str(tmp_path))
    assert len(source) == 1
    assert source.read(0) == Sample(key=f"{name}#0", image=b"picture", text=b"a word")
    assert source.read(0, image=False) == Sample(key=f"{name}#0", image=b"", text=b"a word")


CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12) | st.text('",\n\r ;', max_size=6)


@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=90), st.booleans(), st.booleans())
def test_every_row_is_the_one_that_was_written(tmp_path_factory, rows, quoted: bool, bom: bool) -> None:
    file = io.StringIO(newline="")
    writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n") if quoted else csv.writer(file)
    writer.writerows([("image", "caption"), *rows])
    path = write(tmp_path_factory.mktemp("csv") / "a.csv", b"\xef\xbb\xbf" * bom + file.getvalue().encode())
    source = CsvSource("a", [path], "")
    assert texts(source) == [" ".join(caption.split()).encode() for _, caption in rows]


def test_quotes_are_read_as_the_csv_module_reads_them(tmp_path: Path) -> None:
    content = 'image,caption\n1,a 5" disk\n2,"two\nlines"\n3,"a ""b"", c"\n4,"closed" early\n5,"" \n6,x"y"z\n'
    expected = [row[1] for row in csv.reader(io.StringIO(content))][1:]
    assert len(expected) == 6
    assert texts(CsvSource("a", [write(tmp_path / "a.csv", content)], "")) == [
        " ".join(text.split()).encode() for text in expected
    ]


def test_a_quote_that_nothing_closes_costs_its_own_row_alone(tmp_path: Path) -> None:
    rows = ['1.jpg,"never closed', *[f"{i}.jpg,plain {i}" for i in range(2, 5000)]]
    source = CsvSource("a", [write(tmp_path / "a.csv", "\n".join(["image,caption", *rows]))], "")
    assert len(source) == 4999
    for index in np.random.default_rng(0).integers(1, 4999, 50).tolist():
        assert source.read(index, image=False).text == f"plain {index + 1}".encode()


def test_bad_rows_are_bad_samples_each_of_its_own_reason(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"picture")
    rows = [
        b"x.jpg,good",
        b"x.jpg",
        b"x.jpg,a,b",
        b"x.jpg,\xff",
        b"x.jpg," + b"y" * 70_000,
        b"../x,out",
        b"gone,no",
        b",-",
    ]
    source = CsvSource("a", [write(tmp_path / "a.csv", b"\n\n".join([b"image,caption", *rows]))], str(tmp_path))
    assert len(source) == len(rows) and source.read(0).text == b"good"
    reasons = ["malformed", "malformed", "not-utf8", "too-long"]
    for index, reason in enumerate(
        [f"row-{r}" for r in reasons] + ["image-path-outside", "image-missing", "image-missing"]
    ):
        with pytest.raises(BadSample) as bad:
            source.read(index + 1)
        assert (bad.value.reason, bad.value.key) == (reason, f"a.csv#{index + 1}")


def test_several_files_with_columns_in_other_orders_are_one_source(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "a.csv", "image,caption,label\n" + "".join(f"{i}.jpg,a{i},{i}\n" for i in range(70))),
        write(tmp_path / "b.tsv", "label\tcaption\timage\n" + "".join(f"{i}\tb{i}\t{i}.jpg\n" for i in range(50))),
    ]
    source = pickle.loads(pickle.dumps(CsvSource("both", paths, "")))
    assert texts(source) == [b"a%d" % i for i in range(70)] + [b"b%d" % i for i in range(50)]
    last = source.read(119, image=False)
    assert (last.key, last.label) == ("b.tsv#49", b"49")
    with pytest.raises(IndexError):
        source.read(120)


def test_columns_can_be_told_and_several_captions_are_candidates(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "pic,short,long\nx,one,two words\n")
    source = CsvSource("a", [path], "", ("image=pic", "caption=short", "caption=long"))
    assert source.read(0, image=False).text == b"one\ntwo words"


@pytest.mark.parametrize(
    ("content", "columns", "says"),
    [
        ("", (), "is empty"),
        ("\n", (), "without a header"),
        ("image,caption\n", (), "no rows"),
        ("url,caption\nx,y\n", (), "which column holds the images.*'url', 'caption'"),
        ("image,words\nx,y\n", (), "which column holds the captions.*'words'"),
        ("image,caption\nx,y\n", ("caption=text",), "no column 'text'"),
        ("image,caption\nx,y\n", ("picture=image",), "write image=NAME"),
        ("image,caption\nx,y\n", ("image=image", "image=caption"), "more than one image"),
        (b"\xff\xfe\nx", (), "not UTF-8"),
        (b"image,caption\n" + b"x" * 2**21, (), "no CSV file: it has a line longer than 1 MiB"),
    ],
)
def test_a_table_that_cannot_be_used_is_named_in_one_line(tmp_path: Path, content, columns, says: str) -> None:
    with pytest.raises(UsageError, match=says) as said:
        CsvSource("a", [write(tmp_path / "a.csv", content)], "", columns)
    assert "\n" not in str(said.value)


def test_images_alone_are_a_source_when_it_is_said(tmp_path: Path) -> None:
    source = CsvSource("a", [write(tmp_path / "a.csv", "image,words\nx,y\n")], "", ("caption=",))
    assert source.read(0, image=False).text is None


def test_rows_take_a_byte_each_at_most(tmp_path: Path) -> None:
    source = CsvSource("a", [write(tmp_path / "a.csv", "image,caption\n" + "x.jpg,a caption\n" * 50_000)], "")
    assert len(pickle.dumps(source)) < 50_000 and len(source) == 50_000
