"""Several sets at once: their summary, the table, the file, and that W processes find what one finds."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import ranks
import toy_sets
from triscale.errors import RunError, UsageError
from triscale.evaluation.datasets import open_set, open_sets
from triscale.evaluation.robustness import fit_reference
from triscale.evaluation.suite import Evaluation, Results, base_set, evaluate, write_evaluation, write_results
from triscale.evaluation.tables import results_table

LABELS = tuple(int(number * number) % 12 for number in range(60))
CAPTIONS = [f"kind {n}\nkind {n} again" if n % 3 else f"kind {n}" for n in range(25)]
HOSTILE = ("<script>", "[/red]", "[red]", "$x_", "a\x1b[2Jb", "c\nd\re", "\\", "表 \U0001f600", "\udcff", "x" * 10_000)


def sets_of(folder: Path) -> Path:
    toy_sets.write_set(folder / "wds_first", labels=LABELS, bad=(3, 40))
    toy_sets.write_set(folder / "wds_other", labels=LABELS[:33], shards=2)
    toy_sets.write_set(folder / "wds_strange", labels=LABELS[::-1], names=(*toy_sets.NAMES[:11], "kind 1"))
    toy_sets.write_retrieval_set(folder / "wds_pictures", CAPTIONS, bad=(8,))
    return folder


def evaluate_all(rank: int, world: int, folder: str, batch_size: int, workers: int = 0) -> Evaluation:
    """With a set that has every complication beside those on disk."""
    sets = open_sets(["wds_first", "wds_*"], folder)
    demanding = dataclasses.replace(
        sets[0],
        name="demanding",
        multi_label=True,
        right_labels={f"{n:04}": (n % 12, (n + 5) % 12)[: n % 3] for n in range(60)},
        allowed=(1, 2, 4, 5, 6, 8, 11),
        levels={"groups": tuple(n // 4 for n in range(12))},
        slices={"even": frozenset(f"{n:04}" for n in range(0, 60, 2))},
    )
    encoder = dataclasses.replace(toy_sets.encoder(batch_size), workers=workers)
    return evaluate(encoder, [*sets, demanding], shifts=("other", "strange"))


def written_by(rank: int, world: int, folder: str, output: str, workers: int) -> None:
    """With batches of 7 every process has several; one of 256 holds a whole set, so most processes have none."""
    for batch_size in (7, 256):
        write_evaluation(Path(output, f"{batch_size}-{rank}"), evaluate_all(rank, world, folder, batch_size, workers))


@pytest.mark.parametrize("workers", [0, 1])
def test_every_one_of_three_processes_writes_the_very_bytes_that_one_alone_does(tmp_path: Path, workers: int) -> None:
    folder = str(sets_of(tmp_path / "sets"))
    ranks.run_ranks(written_by, 1, folder, str(tmp_path / "alone"), 0)  # with as many threads
    ranks.run_ranks(written_by, 3, folder, str(tmp_path / "three"), workers)
    for batch_size in (7, 256):
        alone = tmp_path / "alone" / f"{batch_size}-0"
        files = sorted(path.relative_to(alone) for path in alone.rglob("*") if path.is_file())
        assert [path.name for path in files] == [
            *(f"{name}.safetensors" for name in ("demanding", "first", "other", "pictures", "strange")),
            "results.json",
        ]
        for rank in range(3):
            for path in files:
                three = tmp_path / "three" / f"{batch_size}-{rank}" / path
                assert three.read_bytes() == (alone / path).read_bytes(), three


def test_the_drop_is_from_the_first_set_to_the_mean_of_the_shifted(tmp_path: Path) -> None:
    results = evaluate_all(0, 1, str(sets_of(tmp_path)), 7).results
    assert list(results["sets"]) == ["first", "other", "pictures", "strange", "demanding"]
    first, other, strange = (float(results["sets"][name]["top1"]) for name in ("first", "other", "strange"))
    assert len({first, other, strange}) == 3
    assert results["shift_mean"] == pytest.approx((other + strange) / 2)
    assert results["drop"] == pytest.approx(first - (other + strange) / 2)


def test_without_shifted_sets_there_is_no_drop(tmp_path: Path) -> None:
    results = evaluate(toy_sets.encoder(), [open_set(str(toy_sets.write_set(tmp_path / "set")))]).results
    assert (results["shift_mean"], results["drop"]) == (None, None)
    assert "robustness" not in results and "shifted" not in printed(results)


@pytest.mark.parametrize("shift", ["nothing", "pictures"])
def test_a_shifted_set_that_is_no_classification_set_here_is_refused_before_anything_is_computed(
    tmp_path: Path, shift: str
) -> None:
    sets = open_sets(["wds_*"], str(sets_of(tmp_path)))
    idle = dataclasses.replace(toy_sets.encoder(), image=pytest.fail, text=pytest.fail)
    with pytest.raises(UsageError, match=f"'{shift}' is not among .* first, other, strange"):
        evaluate(idle, sets, shifts=("other", shift))


def test_a_base_set_can_be_named_and_is_not_shifted(tmp_path: Path) -> None:
    sets = open_sets(["wds_*"], str(sets_of(tmp_path)))
    found = evaluate(toy_sets.encoder(), sets, shifts=("first",), base="other").results
    assert found["drop"] == pytest.approx(found["sets"]["other"]["top1"] - found["sets"]["first"]["top1"])
    assert found["robustness"]["base"] == "other" and found["robustness"]["shifts"]["first"]["drop"] == found["drop"]
    for shifts, base, message in (
        (("other",), "pictures", "base set 'pictures' is not among"),
        (("first",), "", "'first' is both the base set"),
        (("other", "other"), "", "named twice"),
    ):
        with pytest.raises(UsageError, match=message):
            base_set(sets, shifts, base)


def test_the_robustness_table_says_what_reference_models_lead_one_to_expect(tmp_path: Path) -> None:
    sets = open_sets(["wds_*"], str(sets_of(tmp_path)))
    (tmp_path / "models.csv").write_text("model,first,other\na,30,20\nb,50,45\nc,70,58\nd,80,\n")
    lines = fit_reference(tmp_path / "models.csv", "percent", "first", ("other",))
    found = evaluate(toy_sets.encoder(), sets, shifts=("other",), reference=lines).results
    text = printed(found, width=80)
    shift = found["robustness"]["shifts"]["other"]
    percent = [f"{100 * each:.1f}" for each in (found["sets"]["other"]["top1"], shift["drop"])]
    percent += [f"{100 * shift[key]:.1f}" for key in ("predicted_top1", "effective_robustness")]
    (row,) = (line.split() for line in text.splitlines() if line.split()[:1] == ["other"] and line.split()[-2] == "3")
    assert [row[1], row[2], row[4], row[5]] == percent
    assert row[-1] == f"{100 * lines['other'].residual_spread:.1f}"
    assert "shifted from first" in text
    write_results(tmp_path / "results.json", found)
    assert json.loads((tmp_path / "results.json").read_text())["robustness"]["shifts"]["other"]["line"]["models"] == 3


def test_sets_that_ask_the_same_of_a_model_share_one_classifier(tmp_path: Path) -> None:
    for name in ("a", "b"):
        toy_sets.write_set(tmp_path / name)
    toy_sets.write_set(tmp_path / "c", templates=("{c}",))
    asked: list[str] = []
    counting = dataclasses.replace(
        toy_sets.encoder(), text=lambda texts: asked.extend(texts) or toy_sets.embed_texts(texts)
    )  # fmt: skip
    evaluate(counting, open_sets(["a", "b", "c"], str(tmp_path)))
    assert len(asked) == 12 * 3 + 12


def results_of(names: tuple[str, ...]) -> Results:
    scores = {"task": "classification", "samples": 1234, "classes": 8, "top1": 0.5, "top5": 1.0, "mean_per_class": 0.25}
    scores |= {"top1_interval": [0.471, 0.5288], "mean_per_class_interval": [0.2, 0.3], "ece": 0.0321}
    recall = {f"{way}_recall@{k}": k / 16 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    sets: dict[str, Any] = {name: dict(scores) for name in names}
    sets["pictures"] = {"task": "retrieval", "samples": 50, "captions": 99, **recall, "bad": 3}
    return Results(sets=sets, shift_mean=None, drop=None)


def printed(results: Results, width: int = 160) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(results_table(results))
    return console.export_text()


def row_of(text: str, name: str) -> list[str]:
    return next(line for line in text.splitlines() if name in line).split()


def test_the_table_shows_every_score_in_percent_with_the_level_of_chance() -> None:
    text = printed(results_of(("val",)))
    assert row_of(text, "val") == ["val", "1,234", "50.0", "47.1–52.9", "100.0", "25.0", "20.0–30.0", "3.2", "12.5"]
    assert "shifted" not in text
    assert row_of(text, "pictures") == ["pictures", "50", "3", "6.2", "31.2", "62.5", "6.2", "31.2", "62.5", "2.0"]


def test_results_of_before_there_were_intervals_are_shown_without() -> None:
    results = results_of(("val",))
    for key in ("top1_interval", "mean_per_class_interval", "ece"):
        del results["sets"]["val"][key]
    assert row_of(printed(results), "val") == ["val", "1,234", "50.0", "100.0", "25.0", "12.5"]


def test_what_a_set_is_divided_into_stands_below_it() -> None:
    results = results_of(("val",))
    results["sets"]["val"] |= {"levels": {"synonyms": 0.75}, "slices": {"[red]hard": {"samples": 12, "top1": 0.25}}}
    results["sets"]["val"] |= {"unlabelled": 7, "allowed_classes": 4}
    text = printed(results, width=80)
    assert row_of(text, "val") == ["val", "1,234", "7", "50.0", "100.0", "25.0", "25.0"]
    assert row_of(text, "synonyms") == ["synonyms", "75.0"]
    assert row_of(text, "[red]hard") == ["[red]hard", "12", "25.0"]


def test_names_in_the_table_are_neither_markup_nor_control_codes_and_take_one_line() -> None:
    text = printed(results_of(HOSTILE))
    assert "\x1b" not in text and "\r" not in text
    assert all(f"\n {name} " in text for name in ("<script>", "[/red]", "[red]", "$x_", "\\", "c\ufffdd\ufffde"))
    assert len(text.splitlines()) == len(printed(results_of(tuple("abcdefghij"))).splitlines())


def test_the_table_fits_eighty_columns() -> None:
    for width, wide in ((80, False), (120, True)):
        text = printed(results_of(("fluent-emoji-high-contrast",)), width=width)
        assert "fluent-emoji-high-contrast" in text and "…" not in text
        assert ("47.1–52.9" in text) == wide == ("ECE" in text)


def test_written_results_are_read_back_equal_whatever_the_names(tmp_path: Path) -> None:
    write_results(tmp_path / "new/results.json", results_of(HOSTILE))
    assert json.loads((tmp_path / "new/results.json").read_text()) == results_of(HOSTILE)


def test_a_failed_write_leaves_the_old_results_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_results(tmp_path / "results.json", results_of(("old",)))

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(RunError, match="No space left on device"):
        write_results(tmp_path / "results.json", results_of(("new",)))
    assert os.listdir(tmp_path) == ["results.json"]
    assert "old" in json.loads((tmp_path / "results.json").read_text())["sets"]
