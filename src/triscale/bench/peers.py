"""Other packages that do the same work, behind one form each; every one is optional and imported when asked for.

Losses: `make(batch, scale) -> loss(x, y)` with a `parameters` list. Steps: `make(towers, temperature, micro_batch) ->
step(inputs) -> loss`, which leaves the gradients of the towers in `.grad` as our step does.

    open_clip              ClipLoss, SigLipLoss; the accumulation of its training loop (--accum-freq)
    lightly                NTXentLoss
    gradcache              the functional form of GradCache, arXiv 2101.06983
    sentence_transformers  CachedMultipleNegativesRankingLoss, in both directions
    inf_cl                 cal_flash_loss, the Triton kernels of arXiv 2410.17243 (CUDA; `benchmarks/gpu.py`)
    siglip_kernel          fused_siglip_loss, the sigmoid loss by Triton (CUDA; `benchmarks/gpu.py`)
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triscale.losses import InfoNCE

PACKAGES = {
    "open_clip": "open_clip_torch",
    "lightly": "lightly",
    "gradcache": "gradcache",
    "sentence_transformers": "sentence-transformers",
}
"""Module of every peer, and the name under which it is installed."""
CUDA_PACKAGES = {"inf_cl": "inf-cl", "siglip_kernel": "siglip-kernel"}
"""Of those that run on CUDA alone."""

Inputs = Mapping[str, Tensor]
Step = Callable[[Inputs], Tensor]


def installed(peer: str) -> bool:
    """Whether a peer can be imported."""
    return importlib.util.find_spec(peer) is not None


def version(peer: str) -> str:
    """The installed version of a peer."""
    return importlib.metadata.version((PACKAGES | CUDA_PACKAGES)[peer])


def missing_line(peers: list[str]) -> str:
    """What to say of peers that are not installed."""
    return f"not installed: {', '.join(peers)} (pip install 'triscale[peers]')"


class ClipLoss(nn.Module):
    """open_clip's softmax loss over tower outputs, normalised first as its model does."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.loss = import_module("open_clip.loss").ClipLoss(cache_labels=True)  # as its training task does
        self.logit_scale = nn.Parameter(torch.tensor(scale).log())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of tower outputs (B, d)."""
        return self.loss(F.normalize(x, dim=-1), F.normalize(y, dim=-1), self.logit_scale.exp())


class SigLipLoss(nn.Module):
    """open_clip's sigmoid loss over tower outputs, normalised first as its model does."""

    def __init__(self, scale: float, bias: float) -> None:
        super().__init__()
        self.loss = import_module("open_clip.loss").SigLipLoss()
        self.logit_scale = nn.Parameter(torch.tensor(scale).log())
        self.logit_bias = nn.Parameter(torch.tensor(bias))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of tower outputs (B, d)."""
        x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
        return self.loss(x, y, self.logit_scale.exp(), self.logit_bias)


class NTXentLoss(nn.Module):
    """lightly's NT-Xent over the outputs of two views, image i's at rows i and B+i."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.loss = import_module("lightly.loss.ntx_ent_loss").NTXentLoss(temperature=1 / scale)

    def forward(self, z: Tensor) -> Tensor:
        """The loss of projections (2B, d)."""
        return self.loss(*z.chunk(2))


class InfCL(nn.Module):
    """Inf-CL's softmax loss over tower outputs on one process, normalised first, in both directions as its trainer.

    Its `cal_inf_loss` reduces the scale's gradient over processes and so needs a process group; `cal_flash_loss` is
    the same without one.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.loss = import_module("inf_cl").cal_flash_loss
        self.logit_scale = nn.Parameter(torch.tensor(scale).log())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of tower outputs (B, d), d a multiple of 256 or a smaller power of two."""
        x, y, scale = F.normalize(x, dim=-1), F.normalize(y, dim=-1), self.logit_scale.exp()
        head = min(256, x.shape[1])
        both = (self.loss(a, b, scale=scale, head_dim=head).mean() for a, b in ((x, y), (y, x)))
        return sum(both, torch.zeros((), device=x.device)) / 2


class SiglipKernel(nn.Module):
    """siglip-kernel's sigmoid loss over tower outputs, normalised first.

    Args:
        backend: of `fused_siglip_loss`; "auto" is the one that its router takes, "reference" its eager formula.
    """

    def __init__(self, scale: float, bias: float, backend: str) -> None:
        super().__init__()
        self.loss, self.backend = import_module("siglip_kernel").fused_siglip_loss, backend
        self.logit_scale = nn.Parameter(torch.tensor(scale).log())
        self.logit_bias = nn.Parameter(torch.tensor(bias))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of tower outputs (B, d)."""
        x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
        return self.loss(x, y, self.logit_scale, self.logit_bias, backend=self.backend)


def symmetric_cross_entropy(x: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor:
    """InfoNCE of tower outputs (B, d) as users of plain autograd write it (arXiv 2103.00020, figure 3)."""
    scores = logit_scale.exp() * F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T  # (B, B)
    pairs = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(scores, pairs) + F.cross_entropy(scores.T, pairs)) / 2


def open_clip_accumulation(towers: Mapping[str, nn.Module], temperature: InfoNCE, micro_batch: int) -> Step:
    """The step of open_clip's trainer under --accum-freq, with its ClipLoss.

    All micro-batches are embedded without gradients; then each once more with them, takes its place among the cached
    features of the others, and the whole loss is computed and sent back, once a micro-batch. (Its trainer holds this
    loop among options and logging, so it is written anew here.)
    """
    loss_function = import_module("open_clip.loss").ClipLoss(cache_labels=True)

    def features(name: str, rows: Tensor) -> Tensor:
        return F.normalize(towers[name](rows), dim=-1)

    def step(inputs: Inputs) -> Tensor:
        parts = {name: rows.split(micro_batch) for name, rows in inputs.items()}
        with torch.no_grad():
            cached = {name: [features(name, rows) for rows in parts[name]] for name in parts}
        loss = torch.zeros(())
        for j in range(len(next(iter(parts.values())))):
            whole = {
                name: torch.cat([*cached[name][:j], features(name, parts[name][j]), *cached[name][j + 1 :]])
                for name in parts
            }
            loss = loss_function(whole["image"], whole["text"], temperature.logit_scale.exp())
            loss.backward()
        return loss.detach()

    return step


def gradcache_step(towers: Mapping[str, nn.Module], temperature: InfoNCE, micro_batch: int) -> Step:
    """GradCache's functional form; the loss is its user's, here `symmetric_cross_entropy`.

    The package's class `GradCache` cannot be imported from the release on PyPI, whose modules name one another wrongly.
    """
    functional = import_module("gradcache.functional")

    @functional.cached
    def embed(tower: nn.Module, rows: Tensor) -> Tensor:
        return tower(rows)

    loss_function = functional.cat_input_tensor(symmetric_cross_entropy)

    def step(inputs: Inputs) -> Tensor:
        embeddings: list[list[Tensor]] = []
        second_passes = []
        for name, rows in inputs.items():
            pairs = [embed(towers[name], part) for part in rows.split(micro_batch)]
            embeddings.append([embedding for embedding, _ in pairs])
            second_passes += pairs
        loss = loss_function(*embeddings, temperature.logit_scale)
        loss.backward()
        for embedding, second_pass in second_passes:
            second_pass(embedding)
        return loss.detach()

    return step


class _OneModel(nn.Module):
    """Both towers as sentence-transformers takes a model: features by name in, "sentence_embedding" out."""

    def __init__(self, towers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.towers = nn.ModuleDict(dict(towers))

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        ((name, rows),) = features.items()
        return {"sentence_embedding": self.towers[name](rows)}


def sentence_transformers_step(towers: Mapping[str, nn.Module], temperature: InfoNCE, micro_batch: int) -> Step:
    """sentence-transformers' CachedMultipleNegativesRankingLoss in both directions, which is InfoNCE.

    Its scale is a number that is not learned: the temperature gets no gradient.
    """
    losses = import_module("sentence_transformers.sentence_transformer.losses")
    loss_function = losses.CachedMultipleNegativesRankingLoss(
        nn.Sequential(_OneModel(towers)),  # as its own model class is a sequence of modules
        scale=float(temperature.logit_scale.detach().exp()),
        mini_batch_size=micro_batch,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )

    def step(inputs: Inputs) -> Tensor:
        loss = loss_function([{name: rows} for name, rows in inputs.items()], torch.empty(0))
        loss.backward()
        return loss.detach()

    return step


STEPS: dict[str, Callable[[Mapping[str, nn.Module], InfoNCE, int], Step]] = {
    "open_clip": open_clip_accumulation,
    "gradcache": gradcache_step,
    "sentence_transformers": sentence_transformers_step,
}
"""By peer, its way to a large contrastive batch in the memory of a micro-batch."""
