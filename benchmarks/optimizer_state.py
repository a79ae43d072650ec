"""What an optimizer keeps beside the weights, and how long its step takes.

    python benchmarks/optimizer_state.py [--preset basic-m] [--image NAME] [--text-layers N] [--text-width W]
        [--step] [--rounds 7] [--device cpu] [--json FILE]

Bytes are those of the state's tensors after one step on the meta device: no memory is taken, whatever the size. The
towers are a preset's; --image, any timm model, and the sizes of the text transformer may replace its own.

With --step, optimizers take steps on weights of the towers' shapes on --device, in turns, and the median time of each
is given as its ratio to fused AdamW's. Choose towers that fit the memory ten times over.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from triscale.models.dual_encoder import build_dual_encoder
from triscale.models.presets import find_preset
from triscale.planning.cost import optimizer_state
from triscale.training.optim import OPTIMIZERS, parameter_groups
from triscale.training.settings import OptimSettings


def towers_of(options: argparse.Namespace) -> Mapping[str, nn.Module]:
    """The towers, without values."""
    preset = find_preset(options.preset)
    named = {name: getattr(options, name) for name in ("image", "text_layers", "text_width")}
    changes = {name: value for name, value in named.items() if value is not None}
    if options.image:
        changes["image_options"] = "{}"
    if options.text_width:
        changes["text_heads"] = max(options.text_width // 64, 1)
    settings, sizes = replace(preset.model, **changes), {"vocabulary": preset.vocabulary, "tokens": preset.tokens}
    with torch.device("meta"):
        return build_dual_encoder(settings, image_size=preset.image_size, **sizes).towers()


def optimizer_over(name: str, towers: Mapping[str, nn.Module]) -> torch.optim.Optimizer:
    """An optimizer over all parameters, each of which has a gradient."""
    optimizer = OPTIMIZERS[name](parameter_groups(towers, 0.1), OptimSettings(beta2=0.99, learning_rate=1e-6))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter).normal_()
    return optimizer


def seconds(towers: Mapping[str, nn.Module], device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of a step of each optimizer, in turns, over weights of their own."""
    steps: dict[str, Callable[[], Any]] = {}
    for name in OPTIMIZERS:
        shapes = {lane: [p.shape for p in tower.parameters()] for lane, tower in towers.items()}
        copies = {
            lane: nn.ParameterList([torch.ones(shape, device=device) for shape in each])
            for lane, each in shapes.items()
        }
        steps[name] = optimizer_over(name, copies).step
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            _wait(device)
            began = time.perf_counter()
            step()
            _wait(device)
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(each[1:]) for name, each in times.items()}  # the first makes the state


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="basic-m")
    parser.add_argument("--image", help="a timm model")
    parser.add_argument("--text-layers", type=int)
    parser.add_argument("--text-width", type=int)
    parser.add_argument("--step", action="store_true", help="time steps, too")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    towers = towers_of(options)
    parameters = {lane: sum(p.numel() for p in tower.parameters()) for lane, tower in towers.items()}
    print(", ".join(f"{lane} {count / 1e6:,.1f} M" for lane, count in parameters.items()), "parameters")
    sizes = {name: sum(t.nbytes for t in optimizer_state(name, towers).values()) for name in OPTIMIZERS}
    times = seconds(towers, torch.device(options.device), options.rounds) if options.step else {}
    print(f"{'optimizer':<12} {'bytes':>15} {'of AdamW':>9}" + f" {'step':>10} {'of AdamW':>9}" * bool(times))
    for name, size in sizes.items():
        row = f"{name:<12} {size:>15,} {size / sizes['adamw']:>9.1%}"
        print(row + (f" {1e3 * times[name]:>7.1f} ms {times[name] / times['adamw']:>9.2f}" if times else ""))
    if options.json:
        figures = {"parameters": parameters, "state_bytes": sizes, "step_seconds": times}
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
