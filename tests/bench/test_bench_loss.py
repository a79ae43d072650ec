"""`triscale bench loss`: all ways compute the same loss; table, JSON and picture hold what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

from triscale.bench import loss, measure, peers
from triscale.cli import main
from triscale.options import BenchLossOptions

SETTINGS = loss.Settings(width=8, scale=14.3, device="cpu", dtype="float64", threads=0, reuse_buffers=False)
PEERS = {"info_nce": "open_clip", "sigmoid": "open_clip", "nt_xent": "lightly"}


def value_and_gradients(name: str, method: str) -> tuple[float, list[torch.Tensor]]:
    cases = loss.Cases(name, 12, SETTINGS)
    call = cases.call(method)
    call.before()
    call.run()
    return cases.values[method], [leaf.grad for leaf in cases.inputs if leaf.grad is not None]


def check_same(name: str, method: str) -> None:
    value, gradients = value_and_gradients(name, method)
    ours, our_gradients = value_and_gradients(name, "tiled")
    assert value == pytest.approx(ours, rel=1e-5)
    assert len(gradients) == len(our_gradients) == 3 - loss.LOSSES[name].views
    for gradient, our_gradient in zip(gradients, our_gradients, strict=True):
        torch.testing.assert_close(gradient, our_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", loss.LOSSES)
def test_dense_computes_what_tiled_does(name: str) -> None:
    check_same(name, "dense")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # while a peer is imported
@pytest.mark.parametrize("name", loss.LOSSES)
def test_a_peer_computes_what_tiled_does(name: str) -> None:
    pytest.importorskip(PEERS[name])
    check_same(name, PEERS[name])


def test_the_options_name_the_losses_that_there_are() -> None:
    (names, _) = get_args(get_type_hints(BenchLossOptions)["losses"])
    assert get_args(names) == tuple(loss.LOSSES)


def test_peers_are_measured_only_where_they_are_installed_and_asked_for() -> None:
    for name, peer in PEERS.items():
        assert loss.chosen_methods(name, ["tiled"], False) == ["tiled"]
        expected = ["tiled", "dense", *([peer] if peers.installed(peer) else [])]
        assert loss.chosen_methods(name, ["tiled", "dense"], True) == expected


def test_what_holds_all_scores_is_left_out_where_they_do_not_fit() -> None:
    reason = loss.too_large("info_nce", "dense", 10**7, SETTINGS)
    assert "GiB" in reason and "\n" not in reason
    assert not loss.too_large("info_nce", "tiled", 10**7, SETTINGS)
    assert not loss.too_large("info_nce", "dense", 16, SETTINGS)


def test_the_table_names_what_was_left_out_and_the_floor_counts_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "in_fresh_process", lambda job: 5)  # measured for real in the test below
    monkeypatch.setattr(loss, "default_budget_bytes", lambda device: 8 * 8 * 16**2)
    said: list[str] = []
    report = loss.run(
        ["info_nce", "nt_xent"],
        [16],
        ["tiled", "dense"],
        with_peers=False,
        rounds=1,
        settings=replace(SETTINGS, dtype="float32"),
        command="bench",
        say=said.append,
    )
    assert [(row.task, row.method) for row in report.rows] == [
        ("info_nce", "tiled"),
        ("info_nce", "dense"),
        ("nt_xent", "tiled"),
    ]
    assert [row.floor_flops for row in report.rows] == [4 * 2 * 16**2 * 8] * 2 + [3 * 2 * 32**2 * 8]
    assert [(out.task, out.method) for out in report.left_out] == [("nt_xent", "dense")]
    assert len(said) == 2


def test_the_command_prints_a_table_and_writes_json_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, picture = tmp_path / "loss.json", tmp_path / "loss.png"
    arguments = ["--losses", "info_nce", "--batches", "32", "--width", "8", "--rounds", "2", "--no-peers"]
    arguments += ["--no-reuse-buffers", "--json", str(figures), "--picture", str(picture)]
    assert main(["bench", "loss", *arguments]) == 0
    out = capsys.readouterr().out
    values = json.loads(figures.read_text())
    assert [(row["method"], row["batch"]) for row in values["rows"]] == [("tiled", 32), ("dense", 32)]
    for row in values["rows"]:
        assert row["seconds"]["smallest"] <= row["seconds"]["median"] <= row["seconds"]["largest"]
        assert row["peak_bytes"] >= 0 and row["floor_share"] > 0
        assert row["details"]["loss"] == pytest.approx(values["rows"][0]["details"]["loss"], rel=1e-5)
        assert row["method"] in out
    assert values["command"].startswith("triscale bench loss --losses info_nce")
    assert values["machine"]["torch"] == torch.__version__ and torch.__version__ in out
    assert picture.read_bytes().startswith(b"\x89PNG")
