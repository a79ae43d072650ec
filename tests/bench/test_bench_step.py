"""`triscale bench step`: the errors it prints are true, for ours and for peers, and the floors count passes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from triscale.bench import peers, step, towers
from triscale.bench.towers import Workload
from triscale.cli import main
from triscale.training.verify import relative_errors

SETTINGS = step.Settings(micro_batch=4, device="cpu", threads=0, reuse_buffers=False, budget_bytes=2**30)
ROWS = 12


def small_towers() -> Workload:
    """Towers that take no time; the image tower's last layer is the larger of the two."""

    def draw(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {name: torch.randn(rows, 6, generator=generator) for name in ("image", "text")}

    image = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 8))
    return Workload(towers={"image": image, "text": nn.Linear(6, 8)}, draw=draw)


def taken(method: step.Method, workload: Workload) -> step.Case:
    """A case after one measured step."""
    case = step.warmed_up(method, workload, workload.inputs(ROWS, torch.device("cpu")), SETTINGS)
    call = case.call()
    call.before()
    call.run()
    call.after()
    return case


def errors(method: step.Method) -> dict[str, float | None]:
    torch.manual_seed(0)
    workload = small_towers()
    return step.largest_errors(taken(method, workload), taken(step.Method(name="plain"), workload), method)


@pytest.mark.parametrize("keep", ["0", "1", "auto", "image=2,text=0"])
def test_our_step_has_the_gradients_of_plain_autograd(keep: str) -> None:
    found = errors(step.Method(name="ours", keep=keep))
    assert found["tower_error"] is not None and found["tower_error"] < 1e-5
    assert found["temperature_error"] is not None and found["temperature_error"] < 1e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # while a peer is imported
@pytest.mark.parametrize("peer", peers.STEPS)
def test_a_peer_has_the_tower_gradients_of_plain_autograd_and_its_known_temperature(peer: str) -> None:
    pytest.importorskip(peer)
    found = errors(step.Method(name=peer))
    assert found["tower_error"] is not None and found["tower_error"] < 1e-5
    if peer == "sentence_transformers":
        assert found["temperature_error"] is None, "its scale is a number"
    elif peer == "open_clip":
        micro_batches = ROWS / SETTINGS.micro_batch
        assert found["temperature_error"] == pytest.approx(micro_batches - 1, rel=1e-3), "as many times too large"
    else:
        assert found["temperature_error"] is not None and found["temperature_error"] < 1e-5


def test_a_wrong_gradient_shows() -> None:
    torch.manual_seed(0)
    workload = small_towers()
    method = step.Method(name="ours", keep="0")
    case, direct = taken(method, workload), taken(step.Method(name="plain"), workload)
    case.gradients["text.bias"] *= 2
    found = step.largest_errors(case, direct, method)
    assert found["tower_error"] == pytest.approx(relative_errors(case.gradients, direct.gradients)["text.bias"])
    assert found["tower_error"] is not None and found["tower_error"] > 0.1


def test_methods_are_every_keep_under_every_rematerialisation_then_the_others() -> None:
    names = [method.name for method in step.methods(["0", "auto"], ["none", "block"], False)]
    assert names == ["keep=0", "keep=auto", "keep=0 remat=block", "keep=auto remat=block", "plain"]


def test_the_floor_counts_three_passes_and_a_fourth_for_what_is_not_kept() -> None:
    workload = small_towers()
    forward = {"image": 10.0, "text": 1.0}
    for method, passes in (
        (step.Method(name="plain"), 3 * 11.0),
        (step.Method(name="gradcache"), 4 * 11.0),
        (step.Method(name="ours", keep="0"), 4 * 11.0),
        (step.Method(name="ours", keep="image=0,text=9"), 4 * 10.0 + 3 * 1.0),
        (step.Method(name="ours", keep="1"), 11.0 * (4 - 1 / 3)),
    ):
        case = taken(method, workload) if method.keep else taken(step.Method(name="plain"), workload)
        assert step.floor_flops(case, forward, method, ROWS, 4) == pytest.approx(ROWS * passes)


def test_flops_are_those_of_the_products_attention_included() -> None:
    flops = towers.make_workload("vit-tiny", torch.device("cpu")).forward_flops()
    width, layers, image_tokens, text_tokens = towers.TINY.width, towers.TINY.layers, 65, towers.TINY.tokens
    for lane, tokens in (("image", image_tokens), ("text", text_tokens)):
        blocks = layers * tokens * (2 * 12 * width**2 + 2 * 2 * tokens * width)
        assert blocks < flops[lane] < 1.02 * blocks, "patches and projections come on top"


def test_plain_autograd_is_left_out_where_its_activations_do_not_fit() -> None:
    workload = small_towers()
    assert "GiB" in step.too_large(step.Method(name="plain"), 10**9, workload, SETTINGS)
    assert not step.too_large(step.Method(name="plain"), ROWS, workload, SETTINGS)
    assert not step.too_large(step.Method(name="keep=0", keep="0"), 10**9, workload, SETTINGS)


def test_a_recipe_lends_its_towers_without_dropout() -> None:
    workload = towers.make_workload("scenes", torch.device("cpu"))
    inputs = workload.inputs(2, torch.device("cpu"))
    for name, tower in workload.towers.items():
        with torch.no_grad():
            assert torch.equal(tower(inputs[name]), tower(inputs[name])), f"{name} is random"


def test_the_command_prints_a_table_and_writes_json_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, picture = tmp_path / "step.json", tmp_path / "step.png"
    arguments = ["--batches", "8", "--micro", "4", "--keep", "0", "--rounds", "1", "--no-peers", "--no-reuse-buffers"]
    assert main(["bench", "step", *arguments, "--json", str(figures), "--picture", str(picture)]) == 0
    captured = capsys.readouterr()
    ours, plain = json.loads(figures.read_text())["rows"]
    assert (ours["method"], plain["method"]) == ("keep=0", "plain")
    assert ours["details"]["kept"] == "0 of 2" and ours["time_over_ours"] == 1
    assert ours["details"]["tower_error"] < 1e-5 and ours["details"]["temperature_error"] < 1e-5
    assert 0 < ours["peak_bytes"] < plain["peak_bytes"], "one micro-batch's activations, and two"
    assert "keep=0" in captured.out and "vit-tiny" in captured.out
    assert picture.read_bytes().startswith(b"\x89PNG")
