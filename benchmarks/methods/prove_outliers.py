"""Inputs that the pre-training knows but the task does not: neighbours find them, confidence does not."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.methods.proofs import Figure
from pyfeat.anomaly.demo import elpv_split
from pyfeat.anomaly.images import ImageStream, batched
from pyfeat.anomaly.outlier_study import (
    OutlierResult,
    OutlierTask,
    compare_encoders,
    diagnose,
)
from pyfeat.features import load_backbone
from pyfeat.ssl.config import make_config
from pyfeat.ssl.networks import ResNet, ResNetOptions
from pyfeat.ssl.training import fit

TITLE = "FeatureOutlier: outliers that the pre-training knows"
ABOUT = """
One small residual network is trained on 70 % of scikit-learn's digits, all ten classes, in three ways:
with labels, by SimCLR and by MoCo v3. Known are the digits 0 to 4, with a linear classifier on the frozen
features; foreign are the held-out digits 5 to 9, which all three networks know (PT-OOD), and as a control
crops of two photographs, which none knows. Then an ImageNet network as it is: known are mono-crystalline
solar cells (good or defective), foreign poly-crystalline ones and crops of the photographs. AUROC of foreign
against held-out known inputs; MSP is the largest softmax probability, kNN the distance to the k-th
neighbour on unit features, without labels. The published claim is about ImageNet and its networks; here
it is tried on the smallest set that has its structure.
"""

Array = npt.NDArray[np.float32]
SIDE = 16
NETWORK: dict[str, Any] = {"width": 16, "blocks": (1, 1), "stem": "3x3", "in_channels": 1}
SELF_SUPERVISED = ("simclr", "moco_v3")


def figures(seed: int, *, short: bool) -> Iterator[Figure]:
    """See ``Family``."""
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield from _digit_figures(rng, seed, short=short)
    yield from _cell_figures(rng, short=short)


def _digit_figures(rng: np.random.Generator, seed: int, *, short: bool) -> Iterator[Figure]:
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)
    order = rng.permutation(len(images))
    train, test = np.split(
        order[:: 4 if short else 1], [int(0.7 * len(order[:: 4 if short else 1]))]
    )
    labels = digits.target
    encoders = _encoders(images[train], labels[train], seed, epochs=1 if short else 60)
    known = [part[labels[part] < 5] for part in (train, test)]
    familiar = test[labels[test] >= 5]
    photos = _crops(rng, len(familiar), 8).mean(axis=3)
    task = OutlierTask(
        images[known[0]],
        labels[known[0]],
        images[known[1]],
        labels[known[1]],
        {"familiar": images[familiar], "control": photos},
    )
    results = compare_encoders(
        encoders, {"digits": task}, scores=("max_softmax", "energy", "knn"), seed=seed
    )
    found = {(r.encoder, r.outliers, r.score): r for r in results}
    yield from _claims(found)
    separable = {}
    for name, encode in encoders.items():
        parts = [encode(images[part]) for part in (*known, familiar)]
        separable[name] = diagnose(parts[0], labels[known[0]], *parts[1:], seed=seed).separability
    msp = {name: found[name, "familiar", "max_softmax"].auroc for name in encoders}
    pairs = list(combinations(encoders, 2))
    same = [(separable[a] > separable[b]) == (msp[a] > msp[b]) for a, b in pairs]
    claim = "share of pairs of networks that separability and MSP put in the same order"
    yield Figure(claim, "diagnosis", float(np.mean(same)), "chance", 0.5)


def _claims(found: Mapping[tuple[str, str, str], OutlierResult]) -> Iterator[Figure]:
    def auroc(encoder: str, score: str, outliers: str = "familiar") -> float:
        return found[encoder, outliers, score].auroc

    gap = auroc("supervised", "knn") - auroc("supervised", "max_softmax")
    for name in SELF_SUPERVISED:
        yield Figure(
            "AUROC of MSP, familiar digits",
            "trained with labels",
            auroc("supervised", "max_softmax"),
            name,
            auroc(name, "max_softmax"),
        )
        for rival in ("max_softmax", "energy"):
            yield Figure(
                f"AUROC, familiar digits, {name}",
                "kNN",
                auroc(name, "knn"),
                rival,
                auroc(name, rival),
            )
        yield Figure(
            f"FPR@95, familiar digits, {name}",
            "kNN",
            found[name, "familiar", "knn"].fpr95,
            "max_softmax",
            found[name, "familiar", "max_softmax"].fpr95,
            better="lower",
        )
        yield Figure(
            "gain in AUROC of kNN over MSP, familiar digits",
            name,
            auroc(name, "knn") - auroc(name, "max_softmax"),
            "trained with labels",
            gap,
        )
        yield Figure(
            f"AUROC of kNN, {name}",
            "control",
            auroc(name, "knn", "control"),
            "familiar digits",
            auroc(name, "knn"),
        )
    accuracies = {r.encoder: r.accuracy for r in found.values()}
    worst = min(accuracies, key=lambda name: accuracies[name])
    yield Figure(
        "accuracy of the classifier on known digits",
        "worst network",
        accuracies[worst],
        "best network",
        max(accuracies.values()),
        factor=0.95,
    )
    accepted = [r.accepted for key, r in found.items() if key[1:] == ("familiar", "knn")]
    yield Figure(
        "distance from 0.95 of the share of held-out known digits accepted by kNN, all networks",
        "threshold from training rows",
        abs(float(np.mean(accepted)) - 0.95),
        "the bound",
        0.02,
        better="lower",
    )


def _encoders(
    images: Array, labels: npt.NDArray[Any], seed: int, *, epochs: int
) -> dict[str, Callable[[Array], Tensor]]:
    networks = {"supervised": _supervised(images, labels, epochs=epochs)}
    for name in SELF_SUPERVISED:
        networks[name] = _self_supervised(name, images, seed, epochs=epochs)
    return {name: _encoder(network.eval()) for name, network in networks.items()}


def _encoder(network: nn.Module) -> Callable[[Array], Tensor]:
    def encode(images: Array) -> Tensor:
        with torch.no_grad():
            features: Tensor = network(_resized(images))
        return features

    return encode


def _resized(images: Array) -> Tensor:
    planes = torch.from_numpy(np.ascontiguousarray(images, np.float32))[:, None]
    return functional.interpolate(planes, SIDE, mode="bilinear", align_corners=False)


def _supervised(images: Array, labels: npt.NDArray[Any], *, epochs: int) -> nn.Module:
    """The ten classes by cross-entropy, with the same optimiser, epochs and batches."""
    network, head = ResNet(ResNetOptions(**NETWORK)), nn.Linear(32, 10)
    model = nn.Sequential(network, head)
    x, y = _resized(images), torch.from_numpy(labels)
    steps = epochs * (len(x) // 128)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(x))[: len(x) // 128 * 128].view(-1, 128):
            optimiser.zero_grad()
            moved = torch.roll(x[batch], [int(torch.randint(-1, 2, ())) for _ in range(2)], (2, 3))
            functional.cross_entropy(model(moved), y[batch]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    return network


def _self_supervised(name: str, images: Array, seed: int, *, epochs: int) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "images.npy")
        np.save(path, images)
        objective: dict[str, Any] = {"name": name, "hidden_dim": 128, "out_dim": 64}
        config = {
            "out": str(Path(folder, "run")),
            "data": {"name": "images", "path": str(path), "size": [SIDE] * 2, "channels": "grey"},
            "network": {"name": "resnet", **NETWORK, "blocks": list(NETWORK["blocks"])},
            "objective": {**objective, "min_scale": 0.4, "blur": 0.0, "grey": 0.0},
            "optimiser": {"lr": 2e-3},
            "training": {"epochs": epochs, "batch_size": 128, "seed": seed, "progress": False},
            "watch": {"every": 0},
        }
        config["training"]["checkpoint_every"] = epochs  # type: ignore[index]
        return fit(make_config(config)).backbone()


def _cell_figures(rng: np.random.Generator, *, short: bool) -> Iterator[Figure]:
    backbone = load_backbone(
        "efficientnet_lite0", layers=["_blocks.4" if short else "_blocks.15"], dtype=torch.float32
    )
    size = 64 if short else 128

    def encode(images: Any) -> Tensor:
        stream = ImageStream(images, op="prove_outliers", size=(size, size))
        parts = [backbone(pixels)[0].mean(dim=(2, 3)) for _, pixels in batched(stream, 16)]
        return torch.cat(parts)

    cells = {}
    for kind in ("mono", "poly"):
        split = elpv_split(kind)
        paths = np.array([str(p) for p in (*split.train, *split.test)])
        cells[kind] = (paths, np.array([False] * len(split.train) + split.defective))
    paths, defective = cells["mono"]
    count = 60 if short else len(paths)
    order = rng.permutation(len(paths))[:count]
    train, test = np.split(order, [count * 2 // 3])
    poly = rng.permutation(cells["poly"][0])[: count // 3]
    task = OutlierTask(
        paths[train].tolist(),
        defective[train],
        paths[test].tolist(),
        defective[test],
        {"poly cells": poly.tolist(), "photographs": list(_crops(rng, count // 3, 128))},
    )
    results = compare_encoders(
        {"ImageNet": encode}, {"mono cells": task}, scores=("max_softmax", "energy", "knn")
    )
    found = {(r.outliers, r.score): r for r in results}
    for outliers in task.outliers:
        for rival in ("max_softmax", "energy"):
            yield Figure(
                f"AUROC, mono cells against {outliers}, ImageNet network",
                "kNN",
                found[outliers, "knn"].auroc,
                rival,
                found[outliers, rival].auroc,
            )


def _crops(rng: np.random.Generator, count: int, side: int) -> Array:
    """(count, side, side, 3) in [0, 1], of scikit-learn's two photographs."""
    photos = load_sample_images().images
    crops = []
    for i in range(count):
        photo = photos[i % len(photos)]
        top, left = (int(rng.integers(n - side + 1)) for n in photo.shape[:2])
        crops.append(photo[top : top + side, left : left + side])
    return (np.stack(crops) / 255).astype(np.float32)
