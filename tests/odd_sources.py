"""Bad and odd captions, shards, tables and folders: what each is to be called, or what is to be read of it."""

from __future__ import annotations

import os
import socket
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from odd_files import TarPart, pax, special, tar_bytes, with_size_field
from odd_images import JPEG, PNG, WEBP

HOSTILE = "[/red]<script>alert(1)</script>\x1b[31m\n\u202e&"


class Sidecars(NamedTuple):
    """What stands beside an image, and the caption to be drawn or the reason why there is none."""

    files: dict[str, bytes]
    caption: str = ""
    reason: str = ""


def _captions() -> dict[str, Sidecars]:
    """The caption is that of the .txt, or else of the .json's "title"; the .cls is the id."""
    says: dict[str, tuple[dict[str, bytes], str]] = {
        "byte order mark": ({"txt": b"\xef\xbb\xbfa dog"}, "a dog"),
        "CRLF": ({"txt": b"\r\na dog\r\n"}, "a dog"),
        "NUL and control characters": ({"txt": "a\0 d\x1bo\x07g\x9f".encode()}, "a dog"),
        "white space of all kinds": ({"txt": "\u3000a\t \u00a0dog\u2028 ".encode()}, "a dog"),
        "emoji": ({"txt": "🐕‍🦺 ✅".encode()}, "🐕‍🦺 ✅"),
        "several lines, one empty": ({"txt": b"a dog\n\n   \n"}, "a dog"),
        "16 KiB": ({"txt": b"x" * 16_384}, "x" * 16_384),
        "hostile": ({"txt": b"[/red]<script>\x1b[31m"}, "[/red]<script>[31m"),
        "commas alone": ({"txt": b",,"}, ",,"),
        "JSON": ({"json": b'{"title": "a dog"}'}, "a dog"),
        "JSON with a byte order mark": ({"json": b'\xef\xbb\xbf{"title": "a dog"}'}, "a dog"),
        "JSON in UTF-16": ({"json": '{"title": "a dog"}'.encode("utf-16")}, "a dog"),
        "JSON: a list": ({"json": b'{"title": [null, 3, "", "a dog"]}'}, "a dog"),
        "JSON: lone surrogates": ({"json": b'{"title": "a \\ud800dog"}'}, "a dog"),
        "JSON: NaN and huge numbers beside": (
            {"json": b'{"a": NaN, "b": 1e999, "c": -Infinity, "title": "a dog"}'},
            "a dog",
        ),  # noqa: E501  # fmt: skip
        "JSON: a field twice": ({"json": b'{"title": 1, "title": "a dog"}'}, "a dog"),
        "an empty text beside JSON": ({"txt": b" ", "json": b'{"title": "a dog"}'}, "a dog"),
        "label with white space": ({"txt": b"a dog", "cls": b" \n007\r\n"}, "a dog"),
        "label of 18 digits": ({"txt": b"a dog", "cls": b"9" * 18}, "a dog"),
        "extensions in capitals": ({"TXT": b"a dog", "Json": b"{}"}, "a dog"),
    }
    bad: dict[str, tuple[dict[str, bytes], str]] = {
        "none": ({}, "caption-missing"),
        "empty": ({"txt": b""}, "caption-empty"),
        "white space": ({"txt": "  \r\n\t\u3000\n".encode()}, "caption-empty"),
        "control characters": ({"txt": b"\0\x07\x1b\x7f"}, "caption-empty"),
        "characters of no width": ({"txt": "\u200b\u202e\ufeff\u2060".encode()}, "caption-empty"),
        "Latin-1": ({"txt": b"caf\xe9"}, "caption-not-utf8"),
        "UTF-16": ({"txt": "a dog".encode("utf-16")}, "caption-not-utf8"),
        "surrogates in UTF-8": ({"txt": b"a \xed\xa0\x80 dog"}, "caption-not-utf8"),
        "16 KiB and a byte": ({"txt": b"x" * 16_385}, "caption-too-long"),
        "64 KiB and a byte": ({"txt": b"x" * 65_537}, "caption-too-long"),
        "JSON: 16 KiB and a byte": ({"json": b'{"title": "' + b"x" * 16_385 + b'"}'}, "caption-too-long"),
        "JSON: no field": ({"json": b"{}"}, "caption-missing"),
        "JSON: null": ({"json": b'{"title": null}'}, "caption-missing"),
        "JSON: a number": ({"json": b'{"title": 7}'}, "caption-missing"),
        "JSON: numbers alone": ({"json": b'{"title": [1, 2]}'}, "caption-empty"),
        "JSON: empty file": ({"json": b""}, "metadata-not-json"),
        "JSON: cut off": ({"json": b'{"title": "a d'}, "metadata-not-json"),
        "JSON: no object": ({"json": b'["a dog"]'}, "metadata-not-json"),
        "JSON: not UTF-8": ({"json": b'{"title": "caf\xe9"}'}, "metadata-not-json"),
        "JSON: 30,000 lists deep": ({"json": b"[" * 30_000 + b"]" * 30_000}, "metadata-not-json"),
        "JSON: 10,000 objects deep": ({"json": b'{"a":' * 10_000 + b"1" + b"}" * 10_000}, "metadata-not-json"),
        "JSON: a number of 60,000 digits": ({"json": b'{"a": ' + b"9" * 60_000 + b"}"}, "metadata-not-json"),
        "JSON: 64 KiB and a byte": ({"json": b" " * 65_537}, "metadata-too-large"),
        "label: none": ({"txt": b"a dog", "cls": None}, "label-missing"),  # type: ignore[dict-item]
        "label: a word": ({"txt": b"a dog", "cls": b"dog"}, "label-not-a-number"),
        "label: empty": ({"txt": b"a dog", "cls": b""}, "label-not-a-number"),
        "label: negative": ({"txt": b"a dog", "cls": b"-1"}, "label-not-a-number"),
        "label: a fraction": ({"txt": b"a dog", "cls": b"1.5"}, "label-not-a-number"),
        "label: 19 digits": ({"txt": b"a dog", "cls": b"9" * 19}, "label-not-a-number"),
        "label: digits of another script": ({"txt": b"a dog", "cls": "٣".encode()}, "label-not-a-number"),
        "label: 64 KiB and a byte": ({"txt": b"a dog", "cls": b"1" * 65_537}, "label-too-large"),
    }
    found = {f"caption: {name}": Sidecars(files, caption=caption) for name, (files, caption) in says.items()}
    return found | {f"caption: {name}": Sidecars(files, reason=reason) for name, (files, reason) in bad.items()}


CAPTIONS = _captions()


class Entries(NamedTuple):
    """Parts of a shard: the images that are read by key, and what is listed as not used."""

    parts: Sequence[TarPart]
    read: dict[str, bytes]
    skipped: Sequence[tuple[str, str]] = ()


def _long(letter: str, length: int) -> str:
    return f"{letter * (length - 4)}.png"


def _sparse(holes: int) -> bytes:
    """An entry in GNU's sparse form with `holes` blocks of its map behind the header, and a body of one block."""
    header = tarfile.TarInfo(f"sparse{holes}.png")
    header.type, header.size = tarfile.GNUTYPE_SPARSE, 512
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[482] = bool(holes)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    maps = b"".join(bytes(504) + bytes([number + 1 < holes]) + bytes(7) for number in range(holes))
    return bytes(block) + maps + b"\xff" * 512


def _shards() -> dict[str, Entries]:
    link, hard = special("link.png", tarfile.SYMTYPE), special("hard.png", tarfile.LNKTYPE)
    sized = special("sized.png", tarfile.LNKTYPE)
    sized.size = 4096  # what old programs write of a link's target, without a body
    hostile = HOSTILE + ".png"
    outside = "entry-outside-shard"
    return {
        "absolute path": Entries([("/etc/a.png", PNG)], {}, [("/etc/a.png", outside)]),
        "path that climbs": Entries([("x/../../b.png", PNG)], {}, [("x/../../b.png", outside)]),
        "path that climbs by a pax header": Entries(
            [pax({"path": b"../c.png"}), ("c.png", PNG)], {}, [("../c.png", outside)]
        ),  # noqa: E501  # fmt: skip
        "link": Entries([link], {}, [("link.png", "entry-is-link")]),
        "hard link": Entries([hard], {}, [("hard.png", "entry-is-link")]),
        "hard link with a size": Entries(
            [sized, ("behind.png", PNG)], {"behind": PNG}, [("sized.png", "entry-is-link")]
        ),  # noqa: E501  # fmt: skip
        "character device": Entries([special("c.dev.png", tarfile.CHRTYPE)], {}, [("c.dev.png", "entry-is-device")]),
        "block device": Entries([special("b.dev.png", tarfile.BLKTYPE)], {}, [("b.dev.png", "entry-is-device")]),
        "pipe": Entries([special("pipe.png", tarfile.FIFOTYPE)], {}, [("pipe.png", "entry-is-device")]),
        "folders": Entries(
            [special("f/", tarfile.DIRTYPE), special("g.png", tarfile.DIRTYPE), ("f/a.png", PNG)], {"f/a": PNG}
        ),  # noqa: E501  # fmt: skip
        "sparse": Entries([_sparse(0)], {}, [("sparse0.png", "entry-is-sparse")]),
        "sparse with a long map": Entries(
            [_sparse(3), ("h.png", PNG)], {"h": PNG}, [("sparse3.png", "entry-is-sparse")]
        ),  # noqa: E501  # fmt: skip
        "global pax header": Entries([_global(), ("i.png", PNG)], {"i": PNG}),
        "a pax size": Entries(
            [pax({"size": b"%d" % len(PNG)}), with_size_field(("j.png", PNG), b"00000000000\0")], {"j": PNG}
        ),  # noqa: E501  # fmt: skip
        "a binary size": Entries([with_size_field(("k.png", PNG), b"\x80" + len(PNG).to_bytes(11, "big"))], {"k": PNG}),
        "a size after blanks": Entries([with_size_field(("l.png", PNG), b"%11o " % len(PNG))], {"l": PNG}),
        "duplicate key": Entries([("m.png", PNG), ("m.png", WEBP)], {"m": PNG}, [("m", "key-duplicate")]),
        "two images of a key": Entries([("n.png", PNG), ("n.webp", WEBP)], {"n": PNG}, [("n", "key-duplicate")]),
        "caption without an image": Entries([("o.txt", b"a dog")], {}, [("o", "image-missing")]),
        "key with dots in its folder": Entries([("v1.2/p.png", PNG)], {"v1.2/p": PNG}),
        "key before the first dot": Entries([("q.seg.png", PNG)], {}),
        "no extension, dot files, AppleDouble, others": Entries(
            [("README", b"-"), (".DS_Store", b"-"), ("._r.png", b"\0\5\x16\7"), ("r.npy", b"-"), ("r.png", PNG)],
            {"r": PNG},
        ),
        "extensions in any case": Entries(
            [("s.JPG", JPEG), ("t.Jpeg", JPEG), ("u.PNG", PNG), ("v.WebP", WEBP)],
            {"s": JPEG, "t": JPEG, "u": PNG, "v": WEBP},
        ),
        "extension of another format": Entries([("w.jpg", PNG), ("x.png", JPEG)], {"w": PNG, "x": JPEG}),
        "a name of 5,000 bytes (pax)": Entries(
            [pax({"path": _long("y", 5000).encode()}), ("-", PNG)], {_long("y", 5000)[:-4]: PNG}
        ),  # noqa: E501  # fmt: skip
        "a name of 5,000 bytes (GNU)": Entries(
            [_gnu_long(_long("z", 5000).encode()), ("-", PNG)], {_long("z", 5000)[:-4]: PNG}
        ),  # noqa: E501  # fmt: skip
        "a name that is no UTF-8": Entries([(os.fsdecode(b"caf\xe9.png"), PNG)], {"caf\\xe9": PNG}),
        "a hostile name": Entries([pax({"path": hostile.encode()}), ("-", PNG)], {HOSTILE: PNG}),  # noqa: E501  # fmt: skip
        "a hostile name that is listed": Entries(
            [pax({"path": b"/" + hostile.encode()}), ("-", PNG)], {}, [("/" + hostile, outside)]
        ),  # noqa: E501  # fmt: skip
        "a pax header of 100,000 attributes": Entries([_many_attributes(), ("zz.png", PNG)], {"zz": PNG}),
    }


def _gnu_long(name: bytes) -> bytes:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, len(name) + 1
    body = name + b"\0"
    return header.tobuf(tarfile.GNU_FORMAT) + body + bytes(-len(body) % 512)


def _global() -> bytes:
    header, body = tarfile.TarInfo("pax_global_header"), b"22 path=../outside.png\n"
    header.type, header.size = tarfile.XGLTYPE, len(body)
    return header.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512)


def _many_attributes() -> bytes:
    body = b"6 a=b\n" * 100_000
    header = tarfile.TarInfo("PaxHeaders/x")
    header.type, header.size = tarfile.XHDTYPE, len(body)
    return header.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512)


SHARDS = _shards()

_WHOLE = tar_bytes([("a.png", PNG), ("b.png", PNG)])
_END = len(_WHOLE) - 1024


class Refused(NamedTuple):
    """A file that no run begins with, and what the one line says."""

    file: str
    content: bytes
    says: str


def _refused() -> dict[str, Refused]:
    tars = {
        "empty": (b"", "is empty"),
        "random bytes": (b"\x99" * 4096, "not a tar shard"),
        "digits": (b"9" * 4096, "not a tar shard"),
        "text": (b"Not found\n", "not a tar shard"),
        "gzip": (b"\x1f\x8b\x08" + bytes(4096), "compressed"),
        "Zstandard": (b"\x28\xb5\x2f\xfd" + bytes(4096), "compressed"),
        "no entries": (tar_bytes([]), "holds no samples"),
        "no image": (tar_bytes([("a.txt", b"-"), ("b.gif", b"-")]), "holds no samples"),
        "cut off in an entry": (_WHOLE[: _END - 600], "cut off"),
        "cut off between two entries": (_WHOLE[:_END], "cut off"),
        "cut off in a header": (_WHOLE[: _END // 2 + 100], "cut off"),
        "a size beyond the end": (with_size_field(("a.png", PNG), b"77777777777\0"), "cut off"),
        "a negative size": (with_size_field(("a.png", PNG), b"\xff" * 12), "no readable size"),
        "a size of letters": (with_size_field(("a.png", PNG), b"abcdefghijk\0"), "no readable size"),
        "a size of 2**80": (with_size_field(("a.png", PNG), b"\x80" + b"\x7f" * 11), "cut off"),
        "a wrong checksum": (_WHOLE[: _END // 2] + b"\xff" * 512 + _WHOLE[_END // 2 + 512 :], "damaged at byte"),
        "a pax size that is none": (tar_bytes([pax({"size": b"-5"}), ("a.png", PNG)]), "no readable size"),
        "two archives in one file": (_WHOLE + _WHOLE, "several archives"),
        "two archives, the first filled up": (_WHOLE.ljust(10_240, b"\0") + _WHOLE, "several archives"),
    }
    tables = {
        "empty.csv": (b"", "is empty"),
        "blank.csv": (b"\n\n", "without a header"),
        "header.csv": (b"image,caption\n", "no rows"),
        "columns.csv": (b"url,words\nx,y\n", "which column holds the images"),
        "utf16.csv": ("image,caption\nx,y\n".encode("utf-16"), "not UTF-8"),
        "classic-mac.csv": (b"image,caption\rx.png,a dog\r", "no CSV file"),
        "huge-field.csv": (b"x" * 200_000 + b"\ny\n", "no CSV file"),
        "huge-line.csv": (b"image,caption\n" + b"x" * 2**21, "no CSV file"),
        "text.parquet": (b"image,caption\nx,y\n", "no Parquet file"),
        "cut.parquet": (b"PAR1" + bytes(100), "no Parquet file"),
        "empty.parquet": (b"", "no Parquet file"),
    }
    found = {f"shard: {name}": Refused("0.tar", content, says) for name, (content, says) in tars.items()}
    return found | {f"table: {name}": Refused(name, content, says) for name, (content, says) in tables.items()}


REFUSED = _refused()

WHOLE_ALL_THE_SAME = {
    "shard: one block at the end": _WHOLE[: _END + 512],
    "shard: garbage behind the end": _WHOLE + b"\x99" * 3000,
    "shard: filled up to 10,240 bytes twice": _WHOLE.ljust(20_480, b"\0"),
    "shard: GNU format": tar_bytes([("a.png", PNG), ("b.png", PNG)], tarfile.GNU_FORMAT),
    "shard: pax format": tar_bytes([("a.png", PNG), ("b.png", PNG)], tarfile.PAX_FORMAT),
}
"""Shards of the two samples a and b, in odd forms."""


class CsvRow(NamedTuple):
    """A row of a table `image,caption,label`, and its caption or the reason why there is none."""

    row: bytes
    caption: str = ""
    reason: str = ""


CSV_ROWS = {
    "plain": CsvRow(b"x.png,a dog,1", "a dog"),
    "line breaks and quotes": CsvRow(b'x.png,"a ""big""\r\ndog, \n\nbrown",1', 'a "big" dog, brown'),
    "a quote inside": CsvRow(b'x.png,a 5" disk,1', 'a 5" disk'),
    "NUL in the caption": CsvRow(b"x.png,a \0dog,1", "a dog"),
    "a path with dots that stays inside": CsvRow(b"./sub/../x.png,a dog,1", "a dog"),
    "a link that stays inside": CsvRow(b"inside.png,a dog,1", "a dog"),
    "a field missing": CsvRow(b"x.png,a dog", reason="row-malformed"),
    "a field too many": CsvRow(b"x.png,a dog,1,2", reason="row-malformed"),
    "Latin-1": CsvRow(b"x.png,caf\xe9,1", reason="row-not-utf8"),
    "64 KiB": CsvRow(b"x.png," + b"x" * 65_536 + b",1", reason="row-too-long"),
    "a caption of 20,000 bytes": CsvRow(b"x.png," + b"x" * 20_000 + b",1", reason="caption-too-long"),
    "no caption": CsvRow(b"x.png,,1", reason="caption-empty"),
    "no image": CsvRow(b",a dog,1", reason="image-missing"),
    "an image that is not there": CsvRow(b"gone.png,a dog,1", reason="image-missing"),
    "NUL in the path": CsvRow(b"x.png\0.jpg,a dog,1", reason="image-missing"),
    "a path of 10,000 bytes": CsvRow(b"y" * 10_000 + b",a dog,1", reason="image-missing"),
    "a path below a file": CsvRow(b"x.png/y.png,a dog,1", reason="image-missing"),
    "a path that climbs": CsvRow(b"../outside.png,a dog,1", reason="image-path-outside"),
    "an absolute path": CsvRow(b"/etc/passwd,a dog,1", reason="image-path-outside"),
    "a link out of the folder": CsvRow(b"link.png,a dog,1", reason="image-path-outside"),
    "a link to itself": CsvRow(b"circle.png,a dog,1", reason="image-missing"),
    "a folder for an image": CsvRow(b"sub,a dog,1", reason="image-not-a-file"),
    "a pipe for an image": CsvRow(b"pipe.png,a dog,1", reason="image-not-a-file"),
    "an empty image": CsvRow(b"empty.png,a dog,1", reason="image-empty"),
    "a damaged image": CsvRow(b"damaged.png,a dog,1", reason="image-truncated"),
    "a label that is none": CsvRow(b"x.png,a dog,nan", reason="label-not-a-number"),
}


def write_csv_folder(folder: Path) -> None:
    """The table `rows.csv` of all `CSV_ROWS` beside the images that they name."""
    (folder / "sub").mkdir(parents=True)
    (folder / "x.png").write_bytes(PNG)
    (folder / "empty.png").write_bytes(b"")
    (folder / "damaged.png").write_bytes(PNG[: len(PNG) // 2])
    (folder.parent / "outside.png").write_bytes(PNG)
    (folder / "inside.png").symlink_to("x.png")
    (folder / "link.png").symlink_to("../outside.png")
    (folder / "circle.png").symlink_to("circle.png")
    os.mkfifo(folder / "pipe.png")
    rows = b"\n".join(case.row for case in CSV_ROWS.values())
    (folder / "rows.csv").write_bytes(b"\xef\xbb\xbfimage,caption,label\r\n" + rows + b"\n\n")


class InFolder(NamedTuple):
    """What is done to a folder that holds ok.png with its sidecars, before and after it is opened; what is read."""

    before: Callable[[Path], object]
    read: dict[str, str]
    """Key to "" where the sample is right, or to its reason."""
    skipped: Sequence[tuple[str, str]] = ()
    after: Callable[[Path], object] = lambda folder: None


def _socket(folder: Path) -> None:
    here = os.getcwd()
    os.chdir(folder)  # a socket's path has 108 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket.png")
    finally:
        os.chdir(here)


def _link_out(extension: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / f"ok.{extension}").unlink()
        (folder / f"ok.{extension}").symlink_to("/etc/passwd")

    return change


def _become_folder(extension: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / f"ok.{extension}").unlink()
        (folder / f"ok.{extension}").mkdir()

    return change


_FIELDS = {"png": "image", "txt": "caption", "json": "metadata", "cls": "label"}

FOLDERS = {
    "folder: a link to nothing": InFolder(
        lambda f: (f / "a.png").symlink_to("no"), {"ok": ""}, [("a.png", "entry-is-link")]
    ),  # noqa: E501  # fmt: skip
    "folder: a link to itself": InFolder(
        lambda f: (f / "a.png").symlink_to("a.png"), {"ok": ""}, [("a.png", "entry-is-link")]
    ),  # noqa: E501  # fmt: skip
    "folder: a link to a folder": InFolder(
        lambda f: (f / "a").symlink_to("/etc"), {"ok": ""}, [("a", "entry-is-link")]
    ),  # noqa: E501  # fmt: skip
    "folder: a link inside": InFolder(
        lambda f: [(f / f"a.{e}").symlink_to(f"ok.{e}") for e in _FIELDS], {"a": "", "ok": ""}
    ),  # noqa: E501  # fmt: skip
    "folder: a pipe": InFolder(lambda f: os.mkfifo(f / "a.png"), {"ok": ""}, [("a.png", "entry-is-device")]),
    "folder: a socket": InFolder(_socket, {"ok": ""}, [("socket.png", "entry-is-device")]),
    "folder: an empty image": InFolder(lambda f: (f / "ok.png").write_bytes(b""), {"ok": "image-empty"}),
    "folder: a folder named as an image": InFolder(lambda f: (f / "a.png").mkdir(), {"ok": ""}),
    "folder: a caption alone": InFolder(
        lambda f: (f / "a.txt").write_bytes(b"-"), {"ok": ""}, [("a", "image-missing")]
    ),  # noqa: E501  # fmt: skip
    "folder: two images of a key": InFolder(
        lambda f: (f / "ok.webp").write_bytes(WEBP), {"ok": ""}, [("ok", "key-duplicate")]
    ),  # noqa: E501  # fmt: skip
    "folder: hidden files": InFolder(lambda f: (f / "._ok.png").write_bytes(b"\0\5\x16\7"), {"ok": ""}),
    **{
        f"folder: {field} a link out of it": InFolder(_link_out(extension), {"ok": f"{field}-path-outside"})
        for extension, field in _FIELDS.items()
    },
    **{
        f"folder: {field} that becomes a folder": InFolder(
            lambda folder: None, {"ok": f"{field}-not-a-file"}, after=_become_folder(extension)
        )
        for extension, field in _FIELDS.items()
    },
}


def write_folder(folder: Path) -> None:
    """The folder that `FOLDERS` changes."""
    folder.mkdir(parents=True)
    for extension, content in {"png": PNG, "txt": b"a dog", "json": b"{}", "cls": b"1"}.items():
        (folder / f"ok.{extension}").write_bytes(content)
