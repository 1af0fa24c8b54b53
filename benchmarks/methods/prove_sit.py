"""What SiT has to show, on written digits: probes, few labels, lost pixels, and lost groups of them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.methods.held import Held, train
from benchmarks.methods.proofs import Figure
from benchmarks.methods.scenes import Digits, digits
from pyfeat.ssl.networks import ViT, build
from pyfeat.ssl.networks.vit import pool_tokens
from pyfeat.ssl.parts import MLP, Corruption, group_corruption
from pyfeat.ssl.watch import knn_accuracy, linear_accuracy

TITLE = "SiT: groups of lost pixels, and a teacher that sees them"
ABOUT = """
Digits of scikit-learn, enlarged to 16 x 16: 1,198 to train on without labels, 599 to test on. A ViT of 16 patches (4 x
4 pixels), 48 features, 3 blocks; 720 steps of 64 through `pyfeat train`, no flips, a weight of 5 for lost pixels. All
losses, or one of them alone, have the same steps, data and views. Features are the class token and the mean of patches;
probes are fitted on the 1,198 with their labels. *Few labels*: 60 of them, six of each digit, backbone and classifier
trained 150 steps, mean of the accuracy over 3 draws; *from scratch* the same but for the weights to begin with. *Lost
pixels*: absolute error where half of a test digit is lost, against the mean of the pixels seen and the nearest one
seen. *Single patches*: the same share is lost, patch by patch instead of in groups up to 8 pixels wide.
"""
SIDE, PATCH = 16, 4
_NETWORK = {
    "image_size": SIDE, "patch_size": PATCH, "width": 48, "depth": 3, "heads": 4, "in_channels": 1,
}  # fmt: skip
_OBJECTIVE: dict[str, Any] = {
    "name": "sit", "flip": 0.0, "min_scale": 0.4, "largest_block": 0.5, "hidden_dim": 256,
    "out_dim": 64, "momentum": 0.99, "reconstruction_weight": 5.0,
}  # fmt: skip
_PROBES = {"linear probe": linear_accuracy, "5 nearest": knn_accuracy}


def figures(seed: int, *, short: bool) -> Iterator[Figure]:
    """The figures of one seed."""
    seen, test = (Digits(_enlarged(part.images), part.labels) for part in digits(seed))
    steps = 720
    if short:
        steps = 2
        seen, test = (Digits(part.images[:48], part.labels[:48]) for part in (seen, test))

    def trained(**options: Any) -> Any:
        return train(
            Held(seen.images),
            network={"name": "vit", **_NETWORK},
            objective={**_OBJECTIVE, **options},
            steps=steps,
            batch_size=16 if short else 64,
            seed=seed,
            optimiser={"lr": 2e-3, "weight_decay": 0.04},
        )

    both = trained()
    yield from _filling_figures(both, test, seed)
    torch.manual_seed(seed)
    untrained = build("vit", **_NETWORK).eval()
    yield from _label_figures(both.backbone, untrained, seen, test, 2 if short else 150)
    others = {
        "untrained": untrained,
        "lost pixels alone": trained(contrast_weight=0.0).backbone,
        "contrast alone": trained(reconstruction_weight=0.0).backbone,
        "single patches": trained(largest_block=PATCH / SIDE, align=PATCH).backbone,
    }
    probes = {name: _probes(network, seen, test) for name, network in others.items()}
    whole = _probes(both.backbone, seen, test)
    for probe in _PROBES:
        claim = f"accuracy, {probe}"
        for name, found in probes.items():
            # Of both losses it is asked that they be as good as one alone, within noise.
            factor = 0.99 if name.endswith("alone") else 1.0
            yield Figure(claim, "SiT", whole[probe], name, found[probe], factor=factor)


def _enlarged(images: Tensor) -> Tensor:
    """(N, 1, 16, 16)."""
    return functional.interpolate(images[:, None], size=(SIDE, SIDE), mode="bilinear")


@torch.no_grad()
def _features(network: ViT, images: Tensor) -> Tensor:
    return torch.cat(
        [pool_tokens(network.tokens(part), "both") for part in torch.split(images, 256)]
    )


def _probes(network: ViT, seen: Digits, test: Digits) -> dict[str, float]:
    rows, queries = (_features(network, part.images) for part in (seen, test))
    return {
        "linear probe": linear_accuracy(rows, seen.labels, queries, test.labels),
        "5 nearest": knn_accuracy(rows, seen.labels, queries, test.labels, 5),
    }


def _label_figures(
    trained: ViT, untrained: ViT, seen: Digits, test: Digits, steps: int
) -> Iterator[Figure]:
    accuracies = {}
    for name, network in (("SiT", trained), ("from scratch", untrained)):
        accuracies[name] = sum(_fine_tuned(network, seen, test, steps, i) for i in range(3)) / 3
    claim = "accuracy, few labels"
    yield Figure(claim, "SiT", accuracies["SiT"], "from scratch", accuracies["from scratch"])


def _fine_tuned(network: ViT, seen: Digits, test: Digits, steps: int, draw: int) -> float:
    """Accuracy after training a copy on six of each digit."""
    generator = torch.Generator().manual_seed(draw)
    order = torch.randperm(len(seen.labels), generator=generator)
    rows = torch.cat([order[seen.labels[order] == digit][:6] for digit in range(10)])
    images, labels = seen.images[rows], seen.labels[rows]
    torch.manual_seed(draw)
    backbone = build("vit", **_NETWORK, pool="both")
    backbone.load_state_dict(network.state_dict())
    width = _NETWORK["width"]
    model = nn.Sequential(backbone, MLP((2 * width, width, 10), norm="none", activation="gelu"))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps)
    for _ in range(steps):
        optimiser.zero_grad()
        functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        found = torch.cat(
            [model.eval()(part).argmax(dim=1) for part in torch.split(test.images, 256)]
        )
    return float((found == test.labels).double().mean())


@torch.no_grad()
def _filling_figures(model: Any, test: Digits, seed: int) -> Iterator[Figure]:
    torch.manual_seed(seed)
    mean = model.backbone.intensities.mean
    lost = group_corruption(test.images, 0.5, largest=0.5, mean=mean)
    filled = model.fill_in(lost.images)
    claim = "mean absolute error of lost pixels"
    own = _error(filled, test.images, lost)
    seen = ~lost.mask[:, None]
    means = (test.images * seen).sum(dim=(1, 2, 3)) / seen.sum(dim=(1, 2, 3))
    baselines = {
        "mean of the image": means.view(-1, 1, 1, 1).expand_as(filled),
        "nearest pixel seen": _nearest(test.images, lost.mask),
    }
    for name, guess in baselines.items():
        yield Figure(claim, "SiT", own, name, _error(guess, test.images, lost), better="lower")


def _error(filled: Tensor, images: Tensor, lost: Corruption) -> float:
    return float((filled - images).abs()[lost.mask[:, None]].mean())


def _nearest(images: Tensor, mask: Tensor) -> Tensor:
    """Each pixel as the nearest one that is not under the mask."""
    places = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).float()
    distances = torch.cdist(places, places)  # [P, P]
    filled = []
    for image, lost in zip(images.flatten(2), mask.flatten(1), strict=True):
        seen = (~lost).nonzero().squeeze(1)
        filled.append(image[:, seen[distances[:, seen].argmin(dim=1)]])
    return torch.stack(filled).view_as(images)
