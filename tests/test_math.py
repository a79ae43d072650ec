"""docs/math.md held to the code: its gradients, evaluated literally, its counts and its figures."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import ranks
from triscale import distributed, losses
from triscale.training import parallel
from triscale.training.memory import SavedActivations
from triscale.training.remat import rematerialise
from triscale.training.step import ContrastiveStep

DOCUMENT = (Path(__file__).parents[1] / "docs/math.md").read_text()
LOSSES = ("InfoNCE", "Sigmoid", "NTXent")
VIEWS = {"InfoNCE": 1, "Sigmoid": 1, "NTXent": 2}
SCALE = 7.0


def loss_of(kind: str, tiled: bool, rows: int, **options: object) -> nn.Module:
    """The loss `kind` for `rows` samples, every parameter learned, at the factor SCALE."""
    if kind == "InfoNCE":
        return losses.InfoNCE(tiled, logit_scale=SCALE, **options)  # type: ignore[arg-type]
    if kind == "Sigmoid":
        return losses.Sigmoid(tiled, batch_size=rows, logit_scale=SCALE, **options)  # type: ignore[arg-type]
    return losses.NTXent(1 / SCALE, tiled, learn_temperature=True, **options)  # type: ignore[arg-type]


def embeddings_of(kind: str, rows: int, width: int, rng: torch.Generator) -> list[Tensor]:
    """What the loss takes: (B, d) twice, or (2B, d)."""
    shapes = [(2 * rows, width)] if kind == "NTXent" else [(rows, width)] * 2
    return [torch.randn(shape, dtype=torch.float64, generator=rng).requires_grad_() for shape in shapes]


# Section 1 and 2: the gradients as they stand in the document


def through_normalisation(x: Tensor, unit_gradient: Tensor) -> Tensor:
    """dL/dx_i = (I - u_i u_i^T) dL/du_i / |x_i|."""
    rows = []
    for row, gradient in zip(x, unit_gradient, strict=True):
        u = row / row.norm()
        rows.append((torch.eye(len(u), dtype=u.dtype) - torch.outer(u, u)) @ gradient / row.norm())
    return torch.stack(rows)


def positives(ids: Tensor) -> Tensor:
    """1 where j is in P(i), row i itself included, else 0."""
    same = ((ids[:, None] == ids[None, :]) & (ids >= 0)[:, None]) | torch.eye(len(ids), dtype=torch.bool)
    return same.double()


def gradients_of_pairs(kind: str, x: Tensor, y: Tensor, scale: Tensor, beta: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """InfoNCE and the sigmoid loss: G, and what follows from any G."""
    u, v = F.normalize(x), F.normalize(y)
    s, rows = scale * u @ v.T, len(x)
    same = positives(ids)
    if kind == "InfoNCE":
        r, c = s.exp().sum(1).log(), s.exp().sum(0).log()
        T = same / same.sum(1, keepdim=True)
        G = ((s - r[:, None]).exp() + (s - c[None, :]).exp()) / (2 * rows) - T / rows
    else:
        G = ((s + beta).sigmoid() - same) / rows
    du, dv = scale * G @ v, scale * G.T @ u
    by_parameter = {"logit_scale": (u * du).sum(), "logit_bias": G.sum()}
    return {"0": through_normalisation(x, du), "1": through_normalisation(y, dv), **by_parameter}


def gradients_of_views(z: Tensor, scale: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """NT-Xent."""
    w = F.normalize(z)
    s, itself = scale * w @ w.T, torch.eye(len(z), dtype=torch.bool)
    same = positives(ids).repeat(2, 2) * ~itself
    p = s.masked_fill(itself, -torch.inf).softmax(1)
    T = same / same.sum(1, keepdim=True)
    dw = scale / len(z) * (p + p.T - 2 * T) @ w
    return {"0": through_normalisation(z, dw), "logit_scale": (w * dw).sum() / 2}


@pytest.mark.parametrize("tiled", [True, False], ids=["tiled", "dense"])
@pytest.mark.parametrize("kind", LOSSES)
def test_the_losses_gradients_are_those_of_the_document(kind: str, tiled: bool, rng: torch.Generator) -> None:
    embeddings, ids = embeddings_of(kind, 13, 5, rng), torch.tensor([0, 1, 0, -1, -1, 2, 1, 0, 3, 4, 4, -2, 5])
    loss = loss_of(kind, tiled, 13).double()
    parameters = dict(loss.named_parameters())
    loss(*embeddings, ids).backward()
    with torch.no_grad():
        scale, bias = parameters["logit_scale"].exp(), parameters.get("logit_bias", torch.zeros(()))
        if kind == "NTXent":
            expected = gradients_of_views(embeddings[0], scale, ids)
        else:
            expected = gradients_of_pairs(kind, embeddings[0], embeddings[1], scale, bias, ids)
    found = {**{str(n): e.grad for n, e in enumerate(embeddings)}, **{n: p.grad for n, p in parameters.items()}}
    for name, gradient in found.items():
        assert gradient is not None
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    for e in embeddings:
        assert e.grad is not None
        assert (e.grad * e.detach()).sum(1).abs().max() < 1e-12, "the gradient is orthogonal to the tower's output"


def test_equal_scores_cost_ln_b_and_the_bias_starts_without_a_gradient() -> None:
    x, y = torch.eye(6)[:3].repeat_interleave(3, 0), torch.eye(6)[3:].repeat_interleave(3, 0)  # cosines of zero
    assert float(losses.InfoNCE()(x, y).detach()) == pytest.approx(math.log(9), abs=1e-6)
    sigmoid = losses.Sigmoid(batch_size=9)
    sigmoid(x, y).backward()
    assert sigmoid.logit_bias.grad is not None
    assert float(sigmoid.logit_bias.detach()) == pytest.approx(math.log(1 / 8), abs=1e-6)
    assert float(sigmoid.logit_bias.grad) == pytest.approx(0, abs=1e-6)


# Section 3: products and matrices

PRODUCTS = {"InfoNCE": 4, "Sigmoid": 3, "NTXent": 3}


def counted_flops(function: Callable[[], object]) -> int:
    """The FLOPs of all products in `function`."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("tiled", [True, False], ids=["tiled", "dense"])
@pytest.mark.parametrize("kind", LOSSES)
def test_products_and_saved_memory_are_those_of_the_document(kind: str, tiled: bool, rng: torch.Generator) -> None:
    rows, width = 700, 8
    embeddings = [e.detach().float().requires_grad_() for e in embeddings_of(kind, rows, width, rng)]
    loss, columns = loss_of(kind, tiled, rows), VIEWS[kind] * rows
    product = 2 * columns * columns * width
    assert counted_flops(lambda: loss(*embeddings).backward()) == (PRODUCTS[kind] if tiled else 3) * product
    with SavedActivations([*embeddings, *loss.parameters()]) as saved:
        value = loss(*embeddings)
        kept = saved.bytes
    del value
    if tiled:
        gradients = sum(e.numel() for e in embeddings) + sum(p.numel() for p in loss.parameters())
        assert kept == 4 * gradients, "between the passes there are the gradients and nothing else"
        with torch.no_grad():
            assert counted_flops(lambda: loss(*embeddings)) == product, "without gradients one product"
    else:
        matrices = {"InfoNCE": 2.5, "Sigmoid": 2.25, "NTXent": 1.5}[kind]
        assert kept / (4 * columns * columns) == pytest.approx(matrices, rel=0.05)


# Section 4: what averaging makes of a contrastive loss, and what collectives carry


def clip_loss(x: Tensor, y: Tensor, x_all: Tensor, y_all: Tensor, first: int, t: Tensor) -> Tensor:
    """The mean over the rows x and y, which stand at `first`, of both directions' cross entropies."""
    target = torch.arange(first, first + len(x))
    return (F.cross_entropy(t.exp() * x @ y_all.T, target) + F.cross_entropy(t.exp() * y @ x_all.T, target)) / 2


@pytest.mark.parametrize(
    ("case", "towers", "temperature"), [("own", 0.25, 1), ("local", None, 1), ("gathered", 1, 1), ("summed", 1, 4)]
)
def test_averaging_over_ranks_gives_the_factors_of_the_document(
    case: str, towers: float | None, temperature: float, rng: torch.Generator
) -> None:
    world, rows = 4, 3
    weight = torch.randn(5, 4, dtype=torch.float64, generator=rng)
    inputs = torch.randn(2, world * rows, 5, dtype=torch.float64, generator=rng)
    t = torch.tensor(1.5, dtype=torch.float64)

    def gradients(loss_of_rank: Callable[[int, Tensor, Tensor, Tensor], Tensor], ranks: int) -> tuple[Tensor, Tensor]:
        """The gradients of a linear tower and of t: the mean over ranks, each with its own copy of both."""
        copies = [(weight.clone().requires_grad_(), t.clone().requires_grad_()) for _ in range(ranks)]
        size = world * rows // ranks
        x, y = (
            torch.cat([F.normalize(inputs[lane, r * size : (r + 1) * size] @ copies[r][0]) for r in range(ranks)])
            for lane in range(2)
        )
        # One graph over all ranks' copies: a gather with gradient lets every rank's loss reach every rank's tower.
        sum(loss_of_rank(r, x, y, copies[r][1]) for r in range(ranks)).backward()  # type: ignore[union-attr]
        return tuple(torch.stack([c[n].grad for c in copies]).mean(0) for n in range(2))  # type: ignore[return-value,misc]

    def of_rank(rank: int, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        mine = slice(rank * rows, (rank + 1) * rows)
        if case == "own":
            own = torch.arange(len(x))[:, None] // rows == rank
            x, y = torch.where(own, x, x.detach()), torch.where(own, y, y.detach())
            return clip_loss(x, y, x, y, 0, t)
        if case == "local":
            return clip_loss(x[mine], y[mine], x.detach(), y.detach(), mine.start, t)
        return clip_loss(x[mine], y[mine], x, y, mine.start, t)

    true_weight, true_t = gradients(lambda _, x, y, t: clip_loss(x, y, x, y, 0, t), 1)
    found_weight, found_t = gradients(of_rank, world)
    found_t = found_t * (world if case == "summed" else 1)  # summed over ranks inside the loss, then averaged
    torch.testing.assert_close(found_t, temperature * true_t)
    if towers is None:
        along = (found_weight * true_weight).sum() / true_weight.norm() ** 2 * true_weight
        assert (found_weight - along).norm() > 0.01 * true_weight.norm(), "no multiple of the true gradient"
    else:
        torch.testing.assert_close(found_weight, towers * true_weight)


def test_accumulating_the_whole_loss_k_times_gives_k_times_the_temperature_gradient(rng: torch.Generator) -> None:
    x = torch.randn(12, 5, dtype=torch.float64, generator=rng)
    weight, t = torch.randn(5, 5, dtype=torch.float64, generator=rng).requires_grad_(), torch.tensor(1.0).double()

    def embed() -> Tensor:
        return F.normalize(x @ weight)

    target = F.normalize(torch.randn(12, 5, dtype=torch.float64, generator=rng))
    whole_t = t.clone().requires_grad_()
    clip_loss(embed(), target, embed(), target, 0, whole_t).backward()
    whole, weight.grad = weight.grad, None
    accumulated_t = t.clone().requires_grad_()
    for part in range(3):
        mine = torch.arange(12)[:, None] // 4 == part
        rows = torch.where(mine, embed(), embed().detach())
        clip_loss(rows, target, rows, target, 0, accumulated_t).backward()
    torch.testing.assert_close(weight.grad, whole)
    torch.testing.assert_close(accumulated_t.grad, 3 * whole_t.grad)  # type: ignore[operator]


class CollectiveBytes(TorchDispatchMode):
    """Notes, by collective, the bytes of each tensor that it spreads over the ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = function._schema.name.removeprefix("c10d::").strip("_").removesuffix("_base")
            sizes = [t.numel() * t.element_size() for t in tree_leaves(args) if isinstance(t, Tensor)]
            # One that gathers or scatters is given the whole and this rank's part of it.
            whole = sum(sizes) - (min(sizes) if name in ("allgather", "reduce_scatter") else 0)
            self.calls.setdefault(name, []).append(whole)
        return function(*args, **(kwargs or {}))


ROWS, WIDTH, NUMBER = (5, 3), 4, 8
"""Of each rank; d; bytes of a float64."""


def collectives_of_rank(rank: int, world: int) -> dict[str, dict[str, list[int]]]:
    """Every loss and exchange: the bytes of the collectives of one forward and backward pass."""
    found = {}
    ids = torch.tensor([7, 7, 1, 2, 3])[: ROWS[rank]]  # 7 and 1 stand several times in the batch
    for kind, exchange, given in itertools.product(LOSSES, ("gather", "blocks"), (None, ids)):
        rows = [torch.randn(VIEWS[kind] * ROWS[rank], WIDTH).double() for _ in range(3 - VIEWS[kind])]
        loss = loss_of(kind, True, sum(ROWS), exchange=exchange).double()
        with CollectiveBytes() as counted:
            loss(*[r.requires_grad_() for r in rows], given).backward()
        found[f"{kind} {exchange} {'none' if given is None else 'ids'}"] = counted.calls
    for reduce, keep in SHARDED:
        block = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 16))
        tower = parallel.shard(nn.Sequential(block, nn.Linear(16, WIDTH)), [block], distributed.mesh("cpu", 1, 60))
        step = ContrastiveStep(
            {"image": tower, "text": nn.Linear(6, WIDTH)}, dot_loss, micro_batch=2, keep=keep, reduce=reduce
        )
        with CollectiveBytes() as counted:
            step({lane: torch.randn(6, 6) for lane in step.towers})
        found[f"{reduce} {keep}"] = counted.calls
    return found


SHARDED: tuple[tuple[Literal["every", "once"], int], ...] = (("every", 0), ("every", 2), ("once", 0))
BLOCK_BYTES, REST_BYTES = 4 * (6 * 8 + 8 + 8 * 16 + 16), 4 * (16 * WIDTH + WIDTH)


def dot_loss(x: Tensor, y: Tensor) -> Tensor:
    """A loss without parameters."""
    return (x * y).sum()


@pytest.fixture(scope="module")
def collectives() -> list[dict[str, dict[str, list[int]]]]:
    """`collectives_of_rank` on every rank."""
    return ranks.run_ranks(collectives_of_rank, len(ROWS))


def test_sharded_towers_gather_and_reduce_as_often_as_the_document_says(
    collectives: list[dict[str, dict[str, list[int]]]],
) -> None:
    micro_batches = 3
    for reduce, keep in SHARDED:
        calls = collectives[0][f"{reduce} {keep}"]
        assert calls["allgather"].count(BLOCK_BYTES) == 3 * micro_batches - keep
        assert calls["allgather"].count(REST_BYTES) == micro_batches
        for size in (BLOCK_BYTES, REST_BYTES):
            assert calls["reduce_scatter"].count(size) == (micro_batches if reduce == "every" else 1)


def test_the_losses_collectives_carry_the_bytes_of_the_document(
    collectives: list[dict[str, dict[str, list[int]]]],
) -> None:
    world, total, longest = len(ROWS), sum(ROWS), max(ROWS)
    for kind, exchange, ids in itertools.product(LOSSES, ("gather", "blocks"), ("none", "ids")):
        name = f"{kind} {exchange} {ids}"
        views, sets = VIEWS[kind], {"InfoNCE": 2, "Sigmoid": 2, "NTXent": 1}[kind]
        by_row = views * WIDTH * NUMBER
        gathers = [world * longest * by_row] if exchange == "gather" else []
        sweeps = 1 if kind == "Sigmoid" else 2
        expected = {
            "allgather": gathers + [world * longest * views * NUMBER] * (kind == "NTXent"),
            "reduce_scatter": gathers * (kind != "NTXent"),
            "broadcast": [n * by_row for n in ROWS] * (sweeps if exchange == "blocks" else 0),
            "reduce": [n * by_row for n in ROWS] * (exchange == "blocks" and kind != "NTXent"),
            "allreduce": [world * NUMBER, 3 * NUMBER]  # rows of each rank; loss and accuracy
            + [WIDTH * NUMBER] * {"InfoNCE": 2, "Sigmoid": 0, "NTXent": 1}[kind]  # sums of unit rows
            + [total * NUMBER] * (2 * (kind == "InfoNCE")),  # maxima and sums of columns
        }
        if ids == "ids":
            expected["allgather"].append(world * longest * NUMBER)
            expected["allreduce"] += [2 * WIDTH * NUMBER] * sets  # the two groups with several members
        for calls in (rank[name] for rank in collectives):
            found = {collective: sorted(calls.get(collective, [])) for collective in expected}
            assert found == {collective: sorted(sizes) for collective, sizes in expected.items()}, name
            assert calls.keys() <= expected.keys(), name


# Section 6: passes and FLOPs of the step


class CountingTower(nn.Module):
    """Two products, and how many rows went through them forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 4))
        self.rows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        return self.net(x)


@pytest.mark.parametrize("mode", ["none", "block"])
@pytest.mark.parametrize("keep", [0, 1, 3, 4, 9])
def test_passes_and_flops_of_the_step_are_those_of_the_document(keep: int, mode: str, rng: torch.Generator) -> None:
    rows, micro_batch, width = 24, 6, 4
    towers = {"image": CountingTower(), "text": CountingTower().requires_grad_(False)}
    rematerialise(towers["image"], mode, blocks=[towers["image"].net])
    inputs = {lane: torch.randn(rows, 6, generator=rng) for lane in towers}
    step = ContrastiveStep(towers, losses.InfoNCE(), micro_batch=micro_batch, keep=keep)
    found = counted_flops(lambda: step(inputs))
    kept = min(1, keep * micro_batch / rows)
    first, last = 2 * 6 * 16, 2 * 16 * width
    forward = first + last
    assert towers["image"].rows == (2 - kept) * rows
    assert towers["text"].rows == rows
    seen = 2 * 2 * rows * rows * width  # how each lane's embeddings spread, for the log
    lanes = found - 4 * 2 * rows * rows * width - seen
    trained = (4 - kept) * forward - first  # the first layer's input needs no gradient
    again = first if mode == "block" else 0  # the block's last product is not needed again
    assert lanes == (trained + again + forward) * rows


def test_autocast_per_micro_batch_adds_up_in_float32(rng: torch.Generator) -> None:
    """Weight gradients of many micro-batches: no further from float32 than those of one batch, as one graph's are."""
    tower = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16))
    rows, gradient = torch.randn(256, 32, generator=rng), torch.randn(256, 16, generator=rng)

    def error(backward: Callable[[], None], exact: Tensor | None = None) -> Tensor:
        backward()
        found = torch.cat([p.grad.flatten() for p in tower.parameters() if p.grad is not None])
        tower.zero_grad(set_to_none=True)
        return found if exact is None else (found - exact).norm() / exact.norm()

    def micro_batches(parts: int) -> None:
        for x, g in zip(rows.chunk(parts), gradient.chunk(parts), strict=True):
            with torch.autocast("cpu", torch.bfloat16):
                output = tower(x)
            output.backward(g)

    def one_graph(parts: int) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = [tower(x).float() for x in rows.chunk(parts)]
        torch.cat(outputs).backward(gradient)

    exact = error(lambda: tower(rows).backward(gradient))
    whole = error(lambda: micro_batches(1), exact)
    assert error(lambda: micro_batches(64), exact) < 1.1 * whole
    assert error(lambda: one_graph(64), exact) > 1.5 * whole


def test_formulas_have_nothing_that_github_renders_as_something_else() -> None:
    prose = re.sub(r"```.*?```", "", DOCUMENT, flags=re.DOTALL)
    for line in prose.splitlines():
        formulas = line.split("$")
        assert len(formulas) % 2, f"a dollar sign without its partner: {line}"
        for formula in formulas[1::2]:
            assert formula == formula.strip(), f"a space inside of a dollar sign: {formula}"
            assert not re.search(r"\\[^A-Za-z]|[|*]", formula), f"escaped punctuation, a bar or a star: {formula}"


# Section 6: the figures of the example


def test_the_figures_of_the_example_are_the_formulas() -> None:
    import timm  # here, because every rank of the test above imports this module

    with torch.device("meta"):
        tower = timm.create_model("vit_base_patch16_224", num_classes=768)
        images = torch.empty(1, 3, 224, 224)
    parameters, per_row = sum(p.numel() for p in tower.parameters()), counted_flops(lambda: tower(images))
    total, width, micro_batch, keep, activations = 65_536, 768, 64, 12, 63.3 * 2**20
    assert f"{parameters / 1e6:.1f} million" in DOCUMENT
    assert f"{per_row / 1e9:.1f} GFLOP" in DOCUMENT
    kept_bytes = keep * (micro_batch * activations + 2 * parameters)
    assert f"{kept_bytes / 1e9:.0f} GB" in DOCUMENT
    columns = []
    for world in (1, 8):
        rows, rho = total // world, (world - 1) / world
        count = rows // micro_batch
        share = keep / count
        columns.append(
            {
                "rows; micro-batches": f"{rows:,}; {count:,}",
                "share kept": f"{share:.1%}",
                "plain step": f"{3 * per_row * rows / 1e15:.2f} PFLOP",
                "two-pass step": f"{(4 - share) * per_row * rows / 1e15:.2f} PFLOP ({(4 - share) / 3:.2f} times)",
                "InfoNCE in tiles": f"{8 * rows * total * width / 1e12:.1f} TFLOP",
                "dense": f"{6 * total**2 * width / 1e12:.1f} TFLOP, {4 * total**2 / 1e9:.1f} GB",
                "embeddings": f"{4 * rows * width / 1e6:.0f} MB",
                "loss, peak, gather": f"{4 * width * (3 * rows + (total if world > 1 else 0)) / 1e6:.0f} MB",
                "loss, peak, blocks": f"{4 * width * 3 * rows / 1e6:.0f} MB",
                "activations of the whole": f"{activations * rows / 1e12:.2f} TB",
                "loss's exchange": f"{2 * rho * total * width * 4 / 1e6:.0f} MB",
                "gradients, replicated": f"{2 * rho * parameters * 4 / 1e6:.0f} MB",
                "images": f"{rows * 3 * 224**2 / 1e9:.2f} GB",
            }
        )
    example = DOCUMENT.split("### Example")[1].splitlines()
    for (label, one), eight in zip(columns[0].items(), columns[1].values(), strict=True):
        row = next((line for line in example if line.startswith(f"| {label}")), "")
        assert [cell.strip() for cell in row.split("|")[2:4]] == [one, eight], label
