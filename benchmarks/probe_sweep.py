"""The probes of a sweep trained together against training them one after another.

    python benchmarks/probe_sweep.py            # on the processor, one thread
    python benchmarks/probe_sweep.py --device cuda

One JSON line per case: seconds of both (medians of interleaved runs after one that does not count; of processor time,
or of the clock on a GPU), their ratio, and by how much validation scores differ at the end. Both see the same features
in memory and the same batches, validate as often and keep what did best.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from panterra.evaluate import metrics
from panterra.evaluate.readout import Readout
from panterra.evaluate.scoring import FIGURES, Task, better, sums_of
from panterra.evaluate.sweep import RATES, Linear, Member, Net, Recipe, Table, rates_at, shuffled, train_together


def head(net: Linear) -> nn.Sequential:
    """Build what one member is, the plain way."""
    before = {"batch": nn.BatchNorm1d(net.dim), "layer": nn.LayerNorm(net.dim), "none": nn.Identity()}
    return nn.Sequential(before[net.first], nn.Linear(net.dim, net.width))


def load(module: nn.Sequential, net: Linear, theta: Tensor) -> None:
    """Give a plain head the parameters of a member."""
    weight, bias, gain, shift = (part[0] for part in net._parts(theta[None]))
    state = {"1.weight": weight, "1.bias": bias}
    if net.first != "none":
        state |= {"0.weight": gain, "0.bias": shift}
    if net.first == "batch":
        state |= {"0.running_mean": net.mean, "0.running_var": net.variance, "0.num_batches_tracked": torch.tensor(0)}
    module.load_state_dict(state)


def theta_of(module: nn.Sequential) -> Tensor:
    """Line a plain head's parameters up as a member's are."""
    order = ("1.weight", "1.bias", "0.weight", "0.bias")
    named = dict(module.named_parameters())
    return torch.cat([named[name].detach().flatten() for name in order if name in named])


def image_of(out: Tensor, y: Tensor, readout: Readout) -> Tensor:
    """Lay what a plain head says of grids of cells, [b, h, w, o], out as an image of the labels' size, [b, k, y, x]."""
    side = readout.side
    image = rearrange(out, "b h w (k i j) -> b k (h i) (w j)", i=side, j=side)
    if y.ndim < 3:
        return image[:, :, 0, 0]
    if image.shape[2:] != y.shape[1:]:
        image = F.interpolate(image, size=y.shape[1:], mode="bilinear", align_corners=True)
    return image


def loss_of(image: Tensor, y: Tensor, readout: Readout) -> Tensor:
    if readout.task == "multilabel":
        return F.binary_cross_entropy_with_logits(image, y)
    if readout.task == "regression":
        known = y.isfinite()
        return F.mse_loss(image[:, 0][known], (y[known] - readout.centre) / readout.spread)
    return F.cross_entropy(image, y, ignore_index=-1)


def counted(image: Tensor, y: Tensor, readout: Readout) -> np.ndarray:
    """Count what the figure by which members are chosen is made of."""
    if readout.task in ("classification", "segmentation"):
        return metrics.confusion(y.cpu().numpy(), image.argmax(1).cpu().numpy(), readout.classes)
    said = image > 0 if readout.task == "multilabel" else image[:, 0] * readout.spread + readout.centre
    sums = sums_of(readout.task, said.cpu().numpy(), y.cpu().numpy(), classes=readout.classes, centre=readout.centre)
    found: np.ndarray = sums.sum(0)
    return found


def alone(rate: float, train: Table, val: Table, net: Linear, readout: Readout, metric: str, recipe: Recipe) -> Member:
    """Train one member by itself with torch's modules, optimiser and autograd."""
    train, val = train.checked(), val.checked()
    generator = torch.Generator().manual_seed(recipe.seed)
    module = head(net).to(train.x)
    load(module, net, net.start(generator).to(train.x))
    optimiser = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=recipe.weight_decay)
    best: Member | None = None
    for epoch in range(recipe.epochs):
        module.train()
        batches = shuffled(len(train), recipe, generator)
        for number, index in enumerate(batches):
            optimiser.param_groups[0]["lr"] = rates_at(epoch + number / len(batches), rate, recipe)
            x, y = train.batch(index, learning=True)
            out = module(x.flatten(0, 2)).unflatten(0, x.shape[:3])
            loss = loss_of(image_of(out, y, readout), y, readout)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        if (epoch + 1) % recipe.check_every and epoch + 1 < recipe.epochs:
            continue
        module.eval()
        counts: np.ndarray | float = 0.0
        with torch.no_grad():
            for index in torch.arange(len(val)).split(64):
                x, y = val.batch(index, learning=False)
                out = module(x.flatten(0, 2)).unflatten(0, x.shape[:3])
                counts = counts + counted(image_of(out, y, readout), y, readout)
        score = better(metric, float(FIGURES[readout.task][metric](np.asarray(counts))))
        if best is None or score > best.score:
            best = Member(rate=rate, epoch=epoch + 1, score=score, theta=theta_of(module)[None].clone(), net=net)
        if recipe.forget:
            optimiser = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=recipe.weight_decay)
    assert best is not None
    return best


def made(task: Task, samples: int, grid: int, side: int, dim: int, classes: int, device: str, seed: int) -> Table:
    """Draw features and labels that have something to do with each other."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, classes * side**2, generator=torch.Generator().manual_seed(7)) / math.sqrt(dim)
    x = torch.randn(samples, grid, grid, dim, generator=g)
    out = x @ mixing
    out = rearrange(out + 0.5 * torch.randn(out.shape, generator=g), "b h w (k i j) -> b k (h i) (w j)", i=side, j=side)
    targets = {"regression": out[:, 0] * 3 + 10, "multilabel": (out > 1).float()}
    y = targets.get(task, out.argmax(1))
    if task in ("classification", "multilabel"):
        x, y = x[:, 0, 0], y[..., 0, 0]
    return Table(x=x, y=y).to(device)


def clock(device: str) -> float:
    if device != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


CASES = {
    # task, samples, grid, side, dim, classes, batch, metric, first
    "scene classification, width 128, batch 8": ("classification", 400, 1, 1, 128, 10, 8, "accuracy", "batch"),
    "scene classification, width 128, batch 128": ("classification", 2048, 1, 1, 128, 10, 128, "accuracy", "batch"),
    "scene classification, width 192, batch 8": ("classification", 400, 1, 1, 192, 10, 8, "accuracy", "batch"),
    "scene classification, width 768, batch 8": ("classification", 400, 1, 1, 768, 10, 8, "accuracy", "batch"),
    "segmentation, 64 px, patch 4, 2 classes": ("segmentation", 64, 16, 4, 128, 2, 8, "mean_iou", "none"),
    "segmentation, 64 px, patch 4, 19 classes": ("segmentation", 32, 16, 4, 128, 19, 8, "mean_iou", "none"),
}
EPOCHS = 5
"""Between two looks at the validation samples, as published."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, (task, samples, grid, side, dim, classes, batch, metric, first) in CASES.items():
        if options.only not in name:
            continue
        train, val = (made(task, n, grid, side, dim, classes, options.device, s) for s, n in ((0, samples), (1, 64)))  # type: ignore[arg-type]
        readout = Readout(task=task, classes=classes, side=side)  # type: ignore[arg-type]
        recipe = Recipe(epochs=EPOCHS, batch=batch)
        seconds: dict[str, list[float]] = {"together": [], "one by one": []}
        for repeat in range(-1, options.repeats):
            net: Net = Linear.of(train, readout.outputs, first)  # type: ignore[arg-type]
            began = clock(options.device)
            together = train_together(train, val, net, readout, metric, recipe)
            took = clock(options.device) - began
            plain = Linear.of(train, readout.outputs, first)  # type: ignore[arg-type]
            began = clock(options.device)
            singles = [alone(rate, train, val, plain, readout, metric, recipe) for rate in RATES]
            if repeat >= 0:
                seconds["together"].append(took)
                seconds["one by one"].append(clock(options.device) - began)
        medians = {k: statistics.median(v) for k, v in seconds.items()}
        pairs = list(zip(together, singles, strict=True))
        print(
            json.dumps(
                {
                    "case": name,
                    "device": options.device,
                    "members": len(RATES),
                    "seconds": {k: round(v, 3) for k, v in medians.items()},
                    "ratio": round(medians["one by one"] / medians["together"], 1),
                    "largest_score_difference": max(abs(a.score - b.score) for a, b in pairs),
                    "same_choice": max(pairs, key=lambda p: p[0].score)[0].rate
                    == max(pairs, key=lambda p: p[1].score)[1].rate,
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
