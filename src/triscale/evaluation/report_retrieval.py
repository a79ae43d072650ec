"""The part of a run's page that shows retrieval: what some images and captions find."""

from __future__ import annotations

from triscale.evaluation.matches import Matches
from triscale.evaluation.record import RunRecord
from triscale.evaluation.thumbnails import Thumbnails
from triscale.pages.html import Element, Node, element, name

QUERIES = 8
"""Of each direction that are shown."""
LONGEST_CAPTION = 240


def retrieval_section(record: RunRecord, thumbnails: Thumbnails) -> list[Node]:
    """For every retrieval set what its first queries find; nothing where there is none."""
    if not record.matches:
        return []
    parts: list[Node] = [element("h2", "Retrieval examples")]
    for place, (set_name, matches) in enumerate(record.matches.items()):
        body: list[Node] = []
        if not thumbnails.has(set_name):
            body.append(element("p", "The set could not be opened when this page was made: no images.", class_="note"))
        body.append(element("h3", "From image to text"))
        body += [_image_query(set_name, matches, row, thumbnails) for row in range(min(QUERIES, len(matches.images)))]
        if thumbnails.has(set_name):
            body.append(element("h3", "From text to image"))
            body += [_text_query(set_name, matches, row, thumbnails) for row in range(min(QUERIES, len(matches.texts)))]
        summary = element("summary", name(set_name))
        parts.append(element("details", summary, *body, open=place == 0))
    return parts


def _image_query(set_name: str, matches: Matches, row: int, thumbnails: Thumbnails) -> Element:
    """An image with the captions that score best; its own ones are marked."""
    own = matches.captions[matches.own_texts[row]]
    picture = thumbnails.of(set_name, int(matches.images[row]), own)
    found = [
        element(
            "li",
            "✓ " if is_own else "",
            name(matches.captions[text], LONGEST_CAPTION),
            " ",
            element("span", f"{score:.2f}", class_="aside"),
            class_="hit" if is_own else None,
        )
        for text, score, is_own in zip(
            matches.best_texts[row].tolist(), matches.text_scores[row].tolist(), matches.text_is_own[row].tolist(),
            strict=True,
        )
    ]  # fmt: skip
    rank = int(matches.text_ranks[row])
    parts: list[Node] = [element("ol", *found)]
    if not matches.text_is_own[row].any():
        parts.append(element("p", f"Its own, at rank {rank:,}: ", name(own, LONGEST_CAPTION), class_="note"))
    return element("div", picture or element("div"), element("div", *parts), class_="match")


def _text_query(set_name: str, matches: Matches, row: int, thumbnails: Thumbnails) -> Element:
    """A caption with the images that score best; its own one is marked."""
    own, rank = int(matches.own_images[row]), int(matches.image_ranks[row])
    found = []
    for image, score in zip(matches.best_images[row].tolist(), matches.image_scores[row].tolist(), strict=True):
        picture = thumbnails.of(set_name, image, f"image {image}")
        sign = "✓ " if image == own else ""
        found.append(
            element(
                "li",
                *([picture] if picture else []),
                element("span", f"{sign}{score:.2f}", class_="says" if image == own else "aside"),
                class_="right" if image == own else None,
            )
        )
    picture = thumbnails.of(set_name, own, "the caption's image")
    caption = matches.captions[matches.texts[row]]
    return element(
        "div",
        picture or element("div"),
        element(
            "div",
            name(caption, LONGEST_CAPTION),
            element("div", f"its image has rank {rank:,}", class_="note"),
            element("ul", *found, class_="grid-of-images"),
        ),
        class_="match",
    )
