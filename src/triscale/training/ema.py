"""The exponential moving average of a run's weights, which evaluates better than the last ones."""

# torch's functions over lists of tensors, torch._foreach_*, have no public names.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from triscale.errors import UsageError
from triscale.training.checkpoint import module_tensors
from triscale.training.parallel import local_part, shard_like

UPDATES = "updates"
"""The tensor that counts the updates; no module may have this name."""


class WeightAverage:
    """average <- d average + (1 - d) weights after every step, d = min(decay, (1 + t) / (10 + t)) at update t = 0, 1...

    The warm-up keeps the initial weights from weighing long (it is that of TensorFlow's ExponentialMovingAverage).
    Averaged are the trainable parameters, in float32 at least, elementwise, so sharded ones as well; what is frozen and
    the statistics of BatchNorm are those of the modules themselves.

    Args:
        modules: name to module, the towers and the loss; trained from outside.
        decay: in (0, 1).
    """

    def __init__(self, modules: Mapping[str, nn.Module], decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay must be between 0 and 1, not {decay}")
        self._modules, self._decay, self._updates = dict(modules), decay, 0
        self._parameters = {
            f"{prefix}.{name}": parameter
            for prefix, module in modules.items()
            for name, parameter in module.named_parameters(remove_duplicate=False)
            if parameter.requires_grad
        }
        # By parameter: one that stands under several names has one average.
        self._averages = {p: _wide(p.detach()).clone() for p in self._parameters.values()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights in, after an optimizer step."""
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        self._updates += 1
        averages = [local_part(average) for average in self._averages.values()]
        weights = [local_part(_wide(parameter)) for parameter in self._averages]
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the modules have the averaged weights; afterwards those that are trained, bit for bit."""
        trained = {p: p.detach().clone() for p in self._averages}
        try:
            self._set(self._averages)
            yield
        finally:
            self._set(trained)

    @torch.no_grad()
    def _set(self, values: Mapping[nn.Parameter, Tensor]) -> None:
        for parameter, value in values.items():
            local_part(parameter).copy_(local_part(value))

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint: all that `module_tensors` gives, averaged where it is trained, and the count of updates."""
        averages = {name: self._averages[parameter] for name, parameter in self._parameters.items()}
        return {**module_tensors(self._modules), **averages, UPDATES: torch.tensor(self._updates)}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave; whole tensors, also where the parameters are sharded.

        Raises:
            UsageError: a trainable parameter's average is missing or of another shape.
        """
        for name, parameter in self._parameters.items():
            found = tensors.get(name)
            if found is None or found.shape != parameter.shape:
                shape = "missing" if found is None else str(tuple(found.shape))
                raise UsageError(
                    f"the checkpoint's average of {name} is {shape}, not {tuple(parameter.shape)}: "
                    "use the settings it was made with"
                )
        if UPDATES not in tensors:
            raise UsageError("the checkpoint's average does not say how many updates it has had")
        for name, parameter in self._parameters.items():
            local_part(self._averages[parameter]).copy_(local_part(shard_like(tensors[name], parameter)))
        self._updates = int(tensors[UPDATES])


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
