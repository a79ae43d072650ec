"""The kernels and their launcher: in Triton's interpreter on a CPU, and on CUDA itself where there is one.

The interpreter's bfloat16 product is wrong, so 16 bits are float16 here and both on CUDA.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from ranks import run_ranks
from triscale.errors import UsageError
from triscale.losses import InfoNCE, NTXent, Sigmoid, cuda_sweeps, launch, tiles
from triscale.losses.contrastive import ContrastiveLoss
from triscale.losses.tiled import Options

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
ON_CUDA = torch.cuda.is_available()


def load_kernels() -> None:
    """Import the kernels without the import hook that checks shapes, whose wrapper hides their globals from Triton."""
    name = "triscale.losses.kernels"
    spec = importlib.util.spec_from_file_location(name, Path(launch.__file__).with_name("kernels.py"))
    assert spec is not None and spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


if not ON_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # as conftest has it; a rank's own process has no conftest
load_kernels()
interpreted = pytest.mark.skipif(ON_CUDA, reason="kernels are compiled where there is a CUDA device")

LITERAL = {"info_nce": reference.info_nce, "sigmoid": reference.sigmoid, "nt_xent": reference.nt_xent}
IDS = {"none": None, "some": torch.arange(37) * 5 % 17 - 1}
SMALL = {(kernel, kind): launch.Blocks(32, 32, 32, 4, 1) for kernel, kind in launch.TABLE}


def make(name: str, scale: float, products: Any, exchange: Any = "auto", skip: bool = False) -> ContrastiveLoss:
    if name == "info_nce":
        return InfoNCE(logit_scale=scale, products=products, exchange=exchange, skip_negligible=skip)
    if name == "sigmoid":
        return Sigmoid(batch_size=37, logit_scale=scale, products=products, exchange=exchange)
    return NTXent(1 / scale, learn_temperature=True, products=products, exchange=exchange, skip_negligible=skip)


def lanes_of(name: str, rows: int = 37, width: int = 24) -> list[Tensor]:
    """x and partners y near them; NT-Xent's as views."""
    x, noise = torch.randn(2, rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return [torch.cat([x, x + noise])] if name == "nt_xent" else [x, x + noise]


def run(loss: ContrastiveLoss, lanes: list[Tensor], ids: Tensor | None) -> tuple[float, dict[str, Tensor]]:
    leaves = [lane.clone().requires_grad_() for lane in lanes]
    value = loss(*leaves, ids=ids)
    value.backward()
    gradients = {f"lane {i}": leaf.grad for i, leaf in enumerate(leaves)}
    gradients |= {name: parameter.grad for name, parameter in loss.named_parameters()}
    return float(value.detach()), {name: g.detach().cpu().double() for name, g in gradients.items()}  # type: ignore[union-attr]


def literal(name: str, loss: ContrastiveLoss, lanes: list[Tensor], ids: Tensor | None) -> tuple[float, dict]:
    leaves = [lane.double().cpu().requires_grad_() for lane in lanes]
    parameters = {n: p.detach().double().cpu().requires_grad_() for n, p in loss.named_parameters()}
    value = LITERAL[name](*leaves, *parameters.values(), ids)
    value.backward()
    gradients = {f"lane {i}": leaf.grad for i, leaf in enumerate(leaves)}
    return float(value.detach()), {**gradients, **{n: p.grad for n, p in parameters.items()}}


def use_kernels_on_the_cpu(setattr_: Callable[[Any, str, Any], None]) -> None:
    """Let the launcher take CPU tensors, and several tiles, blocks and groups fit few rows."""
    setattr_(launch, "available", lambda rows: rows.dtype != torch.float64)
    setattr_(cuda_sweeps, "STATISTICS_ROWS", 32)
    setattr_(cuda_sweeps, "SKIP_TILE", 32)
    setattr_(launch, "GROUP", 2)
    setattr_(tiles, "TILE_ROWS", 32)
    setattr_(tiles, "TILE_COLUMNS", 32)


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    use_kernels_on_the_cpu(monkeypatch.setattr)
    with launch.using(table=SMALL):
        yield


@interpreted
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("name", LITERAL)
@pytest.mark.parametrize("form", launch.FORMS)
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("scale", [20.0, 100.0])
def test_float32_kernels_have_the_gradients_of_plain_autograd(name: str, form, ids, scale: float) -> None:
    lanes, loss = [lane.float() for lane in lanes_of(name)], make(name, scale, "inputs")
    with launch.using(form=form):
        value, gradients = run(loss, lanes, ids)
    expected_value, expected = literal(name, loss, lanes, ids)
    assert value == pytest.approx(expected_value, rel=2e-6, abs=1e-6)
    # The interpreter's fma rounds its product, of 144 bits at scale 100, by up to 8e-6.
    assert reference.largest_error(gradients, expected) < (1e-5 if scale < 100 else 2e-5)


@interpreted
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("name", LITERAL)
@pytest.mark.parametrize("form", launch.FORMS)
def test_a_scale_without_clamp_overflows_nothing(name: str, form) -> None:
    """Scores up to 10,000, on which float32 itself has an error of 1e-3: a sum of exponentials would be infinite."""
    x, y = torch.randn(2, 37, 24, generator=torch.Generator().manual_seed(2))
    lanes, loss = [torch.cat([x, y])] if name == "nt_xent" else [x, y], make(name, 1e4, "inputs")
    with launch.using(form=form):
        value, gradients = run(loss, lanes, None)
    expected_value, expected = literal(name, loss, lanes, None)
    assert value == pytest.approx(expected_value, rel=1e-3, abs=1e-3)
    assert reference.largest_error(gradients, expected) < 1e-2


def value_of_rounded(name: str, lanes: list[Tensor], scale: float, bias: float) -> float:
    """The loss without ids, of unit rows rounded to float16, in float64."""
    x, y = (
        torch.nn.functional.normalize(lane.float()).half().double()
        for lane in (lanes if len(lanes) == 2 else lanes * 2)
    )
    scores = scale * x @ y.T
    own = scores.diagonal()
    if name == "nt_xent":
        own = scores.roll(len(x) // 2, 1).diagonal()
        return float((scores.fill_diagonal_(-torch.inf).logsumexp(1) - own).mean())
    if name == "info_nce":
        return float(((scores.logsumexp(1) + scores.logsumexp(0)) / 2 - own).mean())
    return float((torch.nn.functional.softplus(scores + bias).sum() - (own + bias).sum()) / len(x))


@interpreted
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("name", LITERAL)
@pytest.mark.parametrize("form", launch.FORMS)
@pytest.mark.parametrize("given", [torch.float16, torch.float32])
def test_sixteen_bits_round_operands_and_nothing_else(name: str, form, given: torch.dtype) -> None:
    """The loss is exact for the rounded unit rows; gradients differ by the rounding of weights, 2**-11 each."""
    lanes, loss = [lane.to(given) for lane in lanes_of(name)], make(name, 20.0, "fp16")
    with launch.using(form=form):
        value, _ = run(loss, lanes, None)
        _, gradients = run(make(name, 20.0, "fp16"), lanes, IDS["some"])
    bias = float(getattr(loss, "logit_bias", torch.zeros(())).detach())
    assert value == pytest.approx(value_of_rounded(name, lanes, 20.0, bias), rel=1e-6, abs=2e-6)
    _, expected = literal(name, loss, lanes, IDS["some"])
    assert reference.largest_error(gradients, expected) < 4 * torch.finfo(torch.float16).eps


@interpreted
@pytest.mark.usefixtures("on_the_cpu")
def test_weights_below_the_range_of_float16_are_not_lost() -> None:
    """Every positive is a poor match of its row: the gradient is made of weights around 1e-8, in one tile."""
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(64, 16, generator=generator)
    x = torch.cat([y[:1]] * 64) + 0.05 * torch.randn(64, 16, generator=generator)
    loss = make("info_nce", 40.0, "fp16")
    _, gradients = run(loss, [x, y], None)
    _, expected = literal("info_nce", loss, [x, y], None)
    # The row sum of softmaxes over columns: all weights of the rows but the first are small.
    assert reference.largest_error(gradients, expected) < 8 * torch.finfo(torch.float16).eps


@interpreted
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("name", LITERAL)
def test_without_gradients_the_value_is_the_same(name: str) -> None:
    lanes, loss = [lane.float() for lane in lanes_of(name)], make(name, 20.0, "inputs")
    with torch.no_grad():
        value = loss(*lanes)
    assert float(value) == pytest.approx(run(loss, lanes, None)[0], rel=1e-7)


@interpreted
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("name", ["info_nce", "nt_xent"])
def test_tiles_below_rounding_are_left_out_and_only_they(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in four far clusters, in order: what lies between clusters is left out, and no gradient moves by more."""
    lanes = clustered(name)
    launched = []
    original = launch.Tile.run

    def watched(tile: launch.Tile, kernel: str, *arguments, **options) -> None:
        launched.append(kernel)
        original(tile, kernel, *arguments, **options)

    monkeypatch.setattr(launch.Tile, "run", watched)
    found, counts = {}, {}
    for skip in (False, True):
        launched.clear()
        found[skip] = run(make(name, 100.0, "inputs", skip=skip), lanes, None)
        counts[skip] = launched.count("softmax_weights")
    assert counts[True] <= counts[False] / 3
    assert found[True][0] == found[False][0]
    assert reference.largest_error(found[True][1], found[False][1]) < 1e-6


def clustered(name: str) -> list[Tensor]:
    """Four clusters of 32 pairs along axes of their own; NT-Xent's views next to each other in the same order."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(8)[:4].repeat_interleave(32, 0)
    x, y = (centres + 0.1 * torch.randn(128, 8, generator=generator) for _ in range(2))
    return [torch.cat([x, y])] if name == "nt_xent" else [x, y]


COUNTS = [20, 17]
OVER_RANKS = list(itertools.product(LITERAL, ["gather", "blocks"], ["inputs", "fp16"]))


def every_case(rank: int, world: int) -> dict[str, Any]:
    """Gradients of this rank's rows and shares of the parameters'."""
    use_kernels_on_the_cpu(setattr)
    mine = slice(sum(COUNTS[:rank]), sum(COUNTS[: rank + 1]))
    results = {}
    with launch.using(table=SMALL):
        for name, exchange, products in OVER_RANKS:
            lanes = lanes_of("info_nce")
            rows = [lane[mine].float() for lane in lanes]
            given = [torch.cat(rows)] if name == "nt_xent" else rows
            ids = IDS["some"]
            assert ids is not None
            _, results[f"{name} {exchange} {products}"] = run(make(name, 20.0, products, exchange), given, ids[mine])
    return results


@interpreted
def test_over_ranks_the_kernels_have_the_gradients_of_one_process() -> None:
    """Operands of 16 bits travel as such, gradients in float32."""
    ranks = run_ranks(every_case, len(COUNTS))
    for name, exchange, products in OVER_RANKS:
        lanes = [lane.float() for lane in lanes_of(name)]
        _, expected = literal(name, make(name, 20.0, products), lanes, IDS["some"])
        parts = [rank[f"{name} {exchange} {products}"] for rank in ranks]
        found = {n: torch.stack([part[n] for part in parts]).sum(0) for n in expected if not n.startswith("lane")}
        for lane in (n for n in expected if n.startswith("lane")):
            of_ranks = [part[lane] for part in parts]
            if name == "nt_xent":
                of_ranks = [view for views in zip(*(rows.chunk(2) for rows in of_ranks), strict=True) for view in views]
            found[lane] = torch.cat(of_ranks)
        limit = 1e-5 if products == "inputs" else 4 * torch.finfo(torch.float16).eps
        assert reference.largest_error(found, expected) < limit, f"{name} {exchange} {products}"


def test_products_and_exchanges_of_another_name_are_refused() -> None:
    for options, line in (
        (Options(products="fp8"), "products is 'fp8': it must be one of inputs, float32, tf32, bf16, fp16"),  # type: ignore[arg-type]
        (Options(exchange="ring"), "exchange is 'ring': it must be one of auto, gather, blocks"),  # type: ignore[arg-type]
    ):
        with pytest.raises(UsageError, match=line):
            ContrastiveLoss(True, 10.0, 100.0, options)


ON_DEVICE = {
    "float32": (torch.float32, 1e-5),
    "tf32": (torch.float32, 4 * 2.0**-10),
    "fp16": (torch.float16, 4 * 2.0**-10),
    "bf16": (torch.bfloat16, 4 * 2.0**-7),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", LITERAL)
@pytest.mark.parametrize("form", launch.FORMS)
@pytest.mark.parametrize("products", ON_DEVICE)
@pytest.mark.parametrize(("rows", "width"), [(1000, 72), (777, 512)])
def test_on_cuda_every_precision_is_as_exact_as_its_operands(name: str, form, products, rows: int, width: int) -> None:
    dtype, limit = ON_DEVICE[products]
    lanes = [lane.to("cuda", dtype) for lane in lanes_of(name, rows, width)]
    loss = make(name, 30.0, products).cuda()
    with launch.using(form=form):
        value, gradients = run(loss, lanes, None)
    expected_value, expected = literal(name, loss, lanes, None)
    assert value == pytest.approx(expected_value, rel=limit)
    assert reference.largest_error(gradients, expected) < limit


@pytest.mark.gpu
@pytest.mark.parametrize("name", LITERAL)
@pytest.mark.parametrize("form", launch.FORMS)
def test_on_cuda_results_do_not_vary_from_run_to_run(name: str, form) -> None:
    lanes = [lane.to("cuda", torch.bfloat16) for lane in lanes_of(name, 3000, 256)]
    loss = make(name, 50.0, "bf16").cuda()
    with launch.using(form=form):
        results = []
        for _ in range(5):
            loss.zero_grad(set_to_none=True)
            results.append(run(loss, lanes, None))
    for value, gradients in results[1:]:
        assert value == results[0][0]
        assert all(torch.equal(gradients[n], results[0][1][n]) for n in gradients)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["info_nce", "nt_xent"])
def test_on_cuda_negligible_tiles_may_be_left_out(name: str) -> None:
    lanes = [lane.repeat_interleave(32, 0).cuda() for lane in clustered(name)]  # clusters of 1,024 rows
    whole = run(make(name, 100.0, "bf16").cuda(), lanes, None)
    some = run(make(name, 100.0, "bf16", skip=True).cuda(), lanes, None)
    assert some[0] == whole[0]
    assert reference.largest_error(some[1], whole[1]) < 2.0**-6
