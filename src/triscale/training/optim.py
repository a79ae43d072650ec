"""AdamW with weight-decay groups, its state by parameter name, the learning-rate schedule, gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from triscale.errors import UsageError


def parameter_groups(modules: Mapping[str, nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """Divide the trainable parameters into those with and those without weight decay.

    Matrices and filters decay. Vectors and scalars (biases, norms, layer scales, the logit scale) do not, as in CLIP
    (Radford et al., arXiv 2103.00020, section 2.5), nor does what a module itself names in `no_weight_decay()`, timm's
    convention for position embeddings and class tokens.

    Args:
        modules: name to module, such as the towers and the loss; a parameter's name is "MODULE.NAME".
        weight_decay: of the first group; the second one's is 0.

    Returns:
        Groups as torch's optimizers take them, with (name, parameter) pairs. A parameter that modules share stands in
        one group only, under its first name.

    Raises:
        UsageError: nothing is trainable.
    """
    decayed: dict[str, nn.Parameter] = {}
    plain: dict[str, nn.Parameter] = {}
    seen: set[nn.Parameter] = set()
    for prefix, module in modules.items():
        exempt = _exempt_names(module)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                group = plain if parameter.ndim < 2 or name in exempt else decayed
                group[f"{prefix}.{name}"] = parameter
    trainable = {p for module in modules.values() for p in module.parameters() if p.requires_grad}
    if seen != trainable or len(decayed) + len(plain) != len(trainable):
        raise AssertionError("a trainable parameter is not in exactly one group")
    if not trainable:
        raise UsageError(f"nothing to train: every parameter of {', '.join(modules)} is frozen")
    groups = [(decayed, weight_decay), (plain, 0.0)]
    return [{"params": list(group.items()), "weight_decay": decay} for group, decay in groups if group]


def _exempt_names(module: nn.Module) -> set[str]:
    """The full names of the parameters that `module` or a part of it declares in `no_weight_decay()`."""
    names: set[str] = set()
    for prefix, part in module.named_modules():
        declare = getattr(part, "no_weight_decay", None)
        if callable(declare):
            declared: Any = declare()
            names.update(f"{prefix}.{name}" if prefix else name for name in declared)
    return names


def adamw(
    groups: list[dict[str, Any]], *, learning_rate: float, beta1: float, beta2: float, epsilon: float
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) over `parameter_groups`.

    The fused form serves CPU, CUDA and MPS; on CPU it takes under a third of the time of torch's default.
    """
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), eps=epsilon, fused=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as "KIND.PARAMETER" to tensor, such as "exp_avg.image.stem.weight"."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in _named_parameters(optimizer).items():
        for kind, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{kind}.{name}"] = value
    return tensors


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; parameters that had no state then have none afterwards.

    Raises:
        UsageError: a tensor belongs to no parameter, or its shape is not the parameter's.
    """
    index_of = {name: index for index, name in enumerate(_named_parameters(optimizer))}
    shapes = {name: parameter.shape for name, parameter in _named_parameters(optimizer).items()}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        if name not in index_of:
            raise UsageError(
                f"optimizer state {key!r} of the checkpoint belongs to no trainable parameter of this model"
            )
        if value.ndim > 0 and value.shape != shapes[name]:
            raise UsageError(
                f"optimizer state {key!r} of the checkpoint is {tuple(value.shape)},"
                f" the model's parameter {tuple(shapes[name])}"
            )
        state.setdefault(index_of[name], {})[kind] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _named_parameters(optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """Name to parameter, in the order in which torch numbers them."""
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """The rate of the step that follows `step` done ones: linear warmup to `peak`, then a cosine to zero.

    Warmup reaches `peak` with its last step; the cosine (Loshchilov and Hutter, arXiv 1608.03983) would be zero at
    `total_steps`, so that every step counts.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Float[Tensor, ""]:
    """Scale all gradients down so that their common L2 norm is at most `max_norm`; 0: only measure.

    Returns:
        The norm before clipping; not finite where a gradient is not.
    """
    held = [parameter for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in held if parameter.grad is not None])
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(held, max_norm, norm)
    return norm
