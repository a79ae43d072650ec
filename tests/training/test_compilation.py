"""Compiled towers in the step: exact against direct over the same compiled towers, and compiled once."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import ranks
import reference
from triscale import distributed
from triscale.errors import RunError, UsageError
from triscale.losses import InfoNCE
from triscale.models.text import TextTower
from triscale.randomness import derive_seed
from triscale.training import parallel
from triscale.training.batch_norm import synchronise_batch_norm
from triscale.training.compilation import compile_tower, is_compiled, refuse_cuda_graphs
from triscale.training.lane import split_evenly
from triscale.training.plan import LanePlan, smaller
from triscale.training.remat import rematerialise
from triscale.training.step import ContrastiveStep

# Dynamo looks at .grad of a block's input and hides torch's warning about it, but not from a filter that raises.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

SEED, LANES = 7, ("image", "text")


class Block(nn.Module):
    """A residual branch with dropout and stochastic depth."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wide, self.narrow = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.dropout(self.narrow(nn.functional.gelu(self.wide(self.norm(x)))))
        if not self.training:
            return x + branch
        return x + branch * x.new_empty(len(x), 1).bernoulli_(0.7)


class NormalisedBlock(nn.Module):
    """A block with BatchNorm and without randomness."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(torch.relu(self.norm(x)))


class Tower(nn.Module):
    """(m, 6) -> (m, 5)."""

    def __init__(self, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(6, 8), nn.Sequential(block(), block()), nn.Linear(8, 5)

    def forward(self, rows: Tensor) -> Tensor:
        return self.last(self.blocks(self.first(rows)))


def tower(block: type[nn.Module] = Block, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return Tower(block).to(dtype).train()


def both_lanes(one: nn.Module, remat: str = "none") -> dict[str, nn.Module]:
    """Copies for both lanes, which share compiled code, with weights of their own."""
    towers = {lane: rematerialise(copy.deepcopy(one), remat) for lane in LANES}
    with torch.no_grad():
        for parameter in towers["text"].parameters():
            parameter.mul_(0.9)
    return towers


def inputs_of(rows: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {lane: torch.randn(rows, 6, dtype=torch.float64, generator=generator).to(dtype) for lane in LANES}


def direct(
    towers: dict[str, nn.Module], inputs: dict[str, Tensor], parts: int, seed: int = SEED, autocast: bool = False
) -> dict[str, Tensor]:
    """Every micro-batch in one graph, seeded as the design says, then the literal loss and backward()."""
    dtype = inputs["image"].dtype
    embeddings, scale = [], InfoNCE().logit_scale.detach().to(dtype).requires_grad_()
    for lane, rows in inputs.items():
        outputs = []
        for part in split_evenly(len(rows), parts):
            torch.manual_seed(derive_seed("tower", seed, 0, lane, part.start))
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                outputs.append(towers[lane](rows[part]))
        embeddings.append(torch.cat(outputs).to(dtype))
    reference.info_nce(*embeddings, scale).backward()
    assert scale.grad is not None
    found = {**reference.gradients(towers), "loss.logit_scale": scale.grad}
    clear(towers)
    return found


def clear(towers: dict[str, nn.Module]) -> None:
    for module in towers.values():
        module.zero_grad(set_to_none=True)


def step_gradients(
    towers: dict[str, nn.Module], inputs: dict[str, Tensor], micro_batch: int, keep: int, **options: Any
) -> tuple[dict[str, Tensor], float]:
    loss = InfoNCE().to(inputs["image"].dtype)
    step = ContrastiveStep(towers, loss, micro_batch=micro_batch, keep=keep, seed=SEED, **options)
    out = step(inputs)
    found = reference.gradients({**towers, "loss": loss})
    clear(towers)
    return found, out.metrics["replay_error"]


def graphs() -> int:
    """How many graphs were compiled in this process so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module", autouse=True)
def one_compiling_process() -> Iterator[None]:
    """Compile in this process: a pool of others takes longer to start than these blocks to compile."""
    import torch._inductor.config

    with torch._inductor.config.patch(compile_threads=1):
        yield


@pytest.fixture(scope="module")
def compiled(one_compiling_process: None) -> nn.Module:
    return compile_tower(tower())


@pytest.mark.parametrize("remat", ["none", "block"])
@pytest.mark.parametrize(("rows", "micro_batch"), [(24, 6), (23, 6)])
def test_the_gradient_is_that_of_the_compiled_tower_in_one_graph(
    compiled: nn.Module, rows: int, micro_batch: int, remat: str
) -> None:
    """Dropout and stochastic depth on; even and uneven micro-batches; nothing, some and all kept."""
    inputs = inputs_of(rows)
    expected = direct(both_lanes(compiled), inputs, parts=4)
    before = graphs()
    for keep in (0, 2, 99):
        found, replay_error = step_gradients(both_lanes(compiled, remat), inputs, micro_batch, keep)
        assert reference.largest_error(found, expected) < 1e-10, keep
        assert replay_error == 0
    assert graphs() == before
    other = direct(both_lanes(compiled), inputs, parts=4, seed=SEED + 1)
    assert reference.largest_error(other, expected) > 1e-2, "the random numbers do not depend on the seed"


def test_a_tower_is_compiled_once_for_training_and_once_for_evaluation() -> None:
    """Over steps of every keep, uneven and halved micro-batches, and evaluated batches of every size."""
    one = compile_tower(tower())
    towers, inputs, before = both_lanes(one), inputs_of(23), graphs()
    step = ContrastiveStep(towers, InfoNCE().double(), micro_batch=6, keep=0, seed=SEED)
    for keep in (0, 1, 99, 1):
        step.plans = {lane: LanePlan(6, keep) for lane in LANES}
        step(inputs)
        clear(towers)
        step.loss.zero_grad(set_to_none=True)  # type: ignore[attr-defined]
    step.plans = smaller(smaller(step.plans))
    assert step.plans["image"] == (3, 0)
    step(inputs)
    assert graphs() - before == len(towers["image"].get_submodule("blocks"))  # both lanes share them
    bare = tower().eval()
    for module in (one, *towers.values()):
        module.eval()
    with torch.inference_mode():
        for rows in (7, 5, 12):
            evaluated = one(inputs["image"][:rows])
            assert torch.allclose(evaluated, bare(inputs["image"][:rows]), rtol=1e-12, atol=1e-12)
    assert graphs() - before == 2 * len(towers["image"].get_submodule("blocks"))


def test_float32_is_exact_and_bfloat16_no_further_from_it_than_direct_is() -> None:
    one = compile_tower(tower(dtype=torch.float32))
    inputs = inputs_of(23, torch.float32)
    exact = direct(both_lanes(one), inputs, parts=4)
    found, replay_error = step_gradients(both_lanes(one), inputs, 6, 1)
    assert reference.largest_error(found, exact) < 1e-5
    assert replay_error == 0
    yardstick = distance(direct(both_lanes(one), inputs, parts=4, autocast=True), exact)
    for remat, keep in itertools.product(("none", "block"), (0, 1)):
        found, replay_error = step_gradients(both_lanes(one, remat), inputs, 6, keep, autocast_dtype=torch.bfloat16)
        assert 0 < distance(found, exact) < 1.1 * yardstick
        assert replay_error == 0


def distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """|g - g*| over all parameters together."""
    return float(torch.cat([(found[name] - g).double().reshape(-1) for name, g in exact.items()]).norm())


def test_batch_norm_counts_each_micro_batch_once() -> None:
    """Against the bare tower, as nothing is random; kept, computed again, and repeated by rematerialisation."""
    inputs, bare = inputs_of(23), both_lanes(tower(NormalisedBlock))
    expected, _ = step_gradients(bare, inputs, 6, 99, batch_norm="per_micro_batch")
    one = compile_tower(tower(NormalisedBlock))
    for remat, keep in itertools.product(("none", "block"), (0, 1, 99)):
        towers = both_lanes(one, remat)
        found, _ = step_gradients(towers, inputs, 6, keep, batch_norm="per_micro_batch")
        assert reference.largest_error(found, expected) < 1e-10
        for lane, module in towers.items():
            for buffer, other in zip(module.buffers(), bare[lane].buffers(), strict=True):
                assert torch.allclose(buffer, other, rtol=1e-12, atol=1e-12)


def test_a_frozen_tower_is_compiled_for_evaluation(compiled: nn.Module) -> None:
    towers, bare = both_lanes(compiled), both_lanes(tower())
    for each in (towers, bare):
        each["text"].requires_grad_(False)
        each["image"].eval()
    inputs = inputs_of(23)
    found, expected = (step_gradients(each, inputs, 6, 0)[0] for each in (towers, bare))
    assert reference.largest_error(found, expected) < 1e-10


def test_names_stay_and_a_copy_computes_with_its_own_parameters(compiled: nn.Module) -> None:
    assert list(compiled.state_dict()) == list(tower().state_dict())
    assert is_compiled(compiled) and not is_compiled(tower())
    assert isinstance(compiled.get_submodule("blocks.0"), Block)
    copied, rows = copy.deepcopy(compiled), inputs_of(4)["image"]
    expected = seeded_output(copied, rows)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(2)
    assert torch.equal(seeded_output(compiled, rows), expected)
    assert not torch.allclose(seeded_output(copied, rows), expected)


def seeded_output(module: nn.Module, rows: Tensor) -> Tensor:
    torch.manual_seed(2)
    return module(rows).detach()


@pytest.mark.slow
def test_a_vision_transformer_and_our_text_tower_are_exact_with_packed_captions_of_any_length() -> None:
    """Blocks that differ in their stochastic depth, and a number of tokens that changes with every micro-batch."""
    torch.manual_seed(0)
    image = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=8, drop_path_rate=0.2
    )
    text = TextTower(vocabulary=20, tokens=8, width=16, layers=2, heads=2, embedding=8, dropout=0.2, drop_path=0.3)
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 9, (23, 1), generator=generator)
    tokens = torch.randint(1, 20, (23, 8), generator=generator) * (torch.arange(8) < lengths)
    inputs = {"image": torch.rand(23, 3, 16, 16, dtype=torch.float64, generator=generator), "text": tokens}
    towers = {lane: compile_tower(module.double().train()) for lane, module in zip(LANES, (image, text), strict=True)}
    were_disabled = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)  # checks are no graph
    try:
        expected = direct(towers, inputs, parts=4)
        before = graphs()
        for keep, remat in ((0, "none"), (2, "none"), (1, "block")):
            copies = {lane: rematerialise(copy.deepcopy(module), remat) for lane, module in towers.items()}
            found, replay_error = step_gradients(copies, inputs, 6, keep)
            assert reference.largest_error(found, expected) < 1e-10
            assert replay_error == 0
        assert graphs() == before
    finally:
        jaxtyping.config.update("jaxtyping_disable", were_disabled)


def sharded_errors(rank: int, world: int) -> dict[str, float]:
    """The step over sharded compiled towers, whole batch over both ranks, against direct on one."""
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1
    one, inputs = compile_tower(tower()), inputs_of(22)
    expected = direct(both_lanes(one), inputs, parts=4)
    mine, errors = slice(11 * rank, 11 * rank + 11), {}
    for remat, keep in itertools.product(("none", "block"), (0, 1, 99)):
        towers = both_lanes(one, remat)
        for module in towers.values():
            parallel.shard(module, list(module.get_submodule("blocks").children()), distributed.mesh("cpu", 1, 60))
        found, replay_error = step_gradients(towers, {lane: rows[mine] for lane, rows in inputs.items()}, 6, keep)
        whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}
        errors[f"{remat} {keep}"] = reference.largest_error(whole, expected)
        errors[f"{remat} {keep} replay"] = replay_error
    return errors


def test_towers_sharded_over_two_processes_are_exact() -> None:
    for errors in ranks.run_ranks(sharded_errors, 2):
        assert len(errors) == 12
        assert {name: error for name, error in errors.items() if not error < 1e-10} == {}


class Breaking(nn.Module):
    """A block that cannot be captured as one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return self.other(self.linear(x))


def test_a_block_that_breaks_its_graph_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match="Breaking cannot be compiled as one graph") as caught:
        compile_tower(nn.Sequential(Breaking()))(torch.randn(3, 6))
    assert "\n" not in str(caught.value)


def test_a_missing_compiler_ends_in_one_line(tmp_path: Any) -> None:
    import torch._inductor.config

    options = {"cpp.cxx": (str(tmp_path / "no_compiler"),), "force_disable_caches": True}
    with torch._inductor.config.patch(options), pytest.raises(RunError, match="could not be compiled") as caught:
        compile_tower(tower())(inputs_of(3)["image"])
    assert "\n" not in str(caught.value) and "compiler" in str(caught.value)


def test_mistakes_are_refused_in_one_line(compiled: nn.Module) -> None:
    own_forward = tower()
    own_forward.get_submodule("blocks.0").forward = torch.relu  # type: ignore[assignment]
    for one, mode, blocks, message in (
        (tower(), "fast", None, "none, default, max-autotune-no-cudagraphs"),
        (tower(), "reduce-overhead", None, "CUDA graphs"),
        (tower(), "max-autotune", None, "CUDA graphs"),
        (nn.Linear(3, 3), "default", None, "pass blocks="),
        (tower(), "default", [nn.Linear(3, 3)], "no part of the tower"),
        (compiled, "default", None, "compiled already"),
        (rematerialise(tower(), "selective"), "default", None, "selectively"),
        (rematerialise(tower(), "block"), "default", "itself", "pass the same blocks="),
        (synchronise_batch_norm(tower(NormalisedBlock)), "default", None, "synchronises BatchNorm"),
        (own_forward, "default", None, "forward pass of its own"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            compile_tower(one, mode, [one] if blocks == "itself" else blocks)  # type: ignore[list-item]
        assert "\n" not in str(caught.value)
    bare = tower()
    assert compile_tower(bare, "none") is bare and not is_compiled(bare)


def test_towers_given_to_torch_compile_are_recognised_and_cuda_graphs_refused() -> None:
    in_place, wrapped = tower(), torch.compile(tower(), mode="max-autotune-no-cudagraphs")
    in_place.get_submodule("blocks.0").compile(mode="reduce-overhead")
    assert is_compiled(in_place) and is_compiled(wrapped)  # type: ignore[arg-type]
    refuse_cuda_graphs(wrapped)  # type: ignore[arg-type]
    refuse_cuda_graphs(tower())
    for each in (in_place, torch.compile(tower(), mode="max-autotune")):
        with pytest.raises(UsageError, match="CUDA graphs") as caught:
            refuse_cuda_graphs(each)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_auto_is_resolved_for_compiled_towers_as_for_bare_ones(compiled: nn.Module) -> None:
    """Measured uncompiled: nothing is compiled for it, and buffers and random numbers stay."""
    inputs, before = inputs_of(23), graphs()
    plans = []
    for one in (compiled, tower()):
        step = ContrastiveStep(
            both_lanes(one), InfoNCE().double(), micro_batch="auto", keep="auto", budget_bytes=50_000
        )
        plans.append(step.resolve(inputs))
    assert plans[0] == plans[1]
    assert graphs() == before
