"""SeasonContrast against its formula in plain torch: keys, negatives, queues and the teacher."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

pytest.importorskip("lightning")
pytest.importorskip("kornia")

from pyfeat import features
from pyfeat.ssl.config import Optimiser, make_config
from pyfeat.ssl.networks import ResNet, ResNetOptions
from pyfeat.ssl.objectives.base import Plan
from pyfeat.ssl.options import read_options
from pyfeat.ssl.registry import OBJECTIVES
from pyfeat.ssl.training import fit

PLAN = Plan(Optimiser(), steps_per_epoch=4, epochs=5, batch_size=6, sample_shape=(3, 16, 16))
SMALL: dict[str, Any] = {"hidden_dim": 12, "out_dim": 8, "queue_size": 10, "momentum": 0.5}


def make(**options: Any) -> Any:
    entry = OBJECTIVES.find("season_contrast")
    backbone = ResNet(ResNetOptions(width=4, blocks=(1, 1), norm="group"))
    return entry.make(backbone, read_options("test", "", entry.options, SMALL | options), PLAN)


def dates(size: int = 6, count: int = 3) -> dict[str, Any]:
    return {"images": torch.rand(size, count, 3, 16, 16), "index": torch.arange(size)}


def unit(x: Tensor) -> Tensor:
    return functional.normalize(x.detach().double(), dim=1)


def moved(objective: Any) -> Any:
    """With a teacher that differs from its student."""
    with torch.no_grad():
        for parameter in objective.teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return objective


class Fixed(nn.Module):
    """Views that are given, in the order of their calls."""

    def __init__(self, *views: Tensor) -> None:
        super().__init__()
        self.views = list(views)

    def forward(self, images: Tensor) -> Tensor:
        return self.views.pop(0)


@pytest.mark.parametrize("filled", [0, 4, 13], ids=["no queue", "part of one", "a full one"])
def test_each_space_is_one_positive_among_its_own_negatives(filled: int) -> None:
    objective = moved(make(temperature=0.3))
    for queue in objective.queues:
        if filled:
            queue.enqueue(functional.normalize(torch.randn(filled, 8), dim=1))
    query, k1 = torch.rand(2, 6, 3, 16, 16)
    k0, k2 = torch.rand(2, 6, 3, 16, 16)
    objective.crop, objective.augment = Fixed(query, k1), Fixed(k0, k2)
    losses = objective.training_loss(dates())
    backbone, *heads = objective.teacher.module
    total = 0.0
    for i, name in enumerate(("common", "augmentation", "season")):
        z = unit(objective.heads[i](objective.backbone(query)))
        keys = [unit(heads[i](backbone(k))) for k in (k0, k1, k2)]
        positive = (z * keys[i]).sum(dim=1, keepdim=True)
        negatives = [objective.queues[i].features.double()]
        negatives += [keys[j] for j in range(3) if j != i] if i > 0 else []
        logits = torch.cat([positive, *(z @ other.T for other in negatives)], dim=1) / 0.3
        assert logits.shape[1] == 1 + min(filled, 10) + (2 * 6 if i > 0 else 0)
        expected = functional.cross_entropy(logits, torch.zeros(6, dtype=torch.int64))
        torch.testing.assert_close(losses[name].double(), expected, atol=1e-5, rtol=1e-5)
        total += float(expected)
    assert losses["loss"].item() == pytest.approx(total, rel=1e-5)
    losses["loss"].backward()
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())
    assert all(parameter.grad is not None for parameter in objective.heads[2].parameters())


def test_the_views_are_of_the_dates_that_the_spaces_need() -> None:
    objective, images = make(), dates()["images"]
    seen: list[tuple[str, int]] = []
    for name in ("crop", "augment"):

        def note(_: Any, inputs: Any, name: str = name) -> None:
            [t] = [t for t in range(3) if torch.equal(inputs[0], images[:, t])]
            seen.append((name, t))

        getattr(objective, name).register_forward_pre_hook(note)
    query, keys = objective.views(images)
    assert query.shape == (6, 3, 16, 16)
    assert len(keys) == 3
    assert seen == [("crop", 0), ("augment", 1), ("crop", 2), ("augment", 0)]
    one = make(spaces="one")
    assert len(one.views(images)[1]) == 1
    assert set(one.training_loss(dates())) == {"loss"}


def test_a_query_keeps_its_colours_and_its_sides() -> None:
    objective = make(min_scale=1.0)
    ramp = torch.linspace(0, 1, 16).expand(64, 3, 16, 16)
    crops = objective.crop(ramp)  # at most the ratio of sides changes
    assert bool((crops.diff(dim=3) >= -1e-6).all())
    torch.testing.assert_close(crops[:, :1].expand_as(crops), crops)
    assert float(crops.amax(dim=(1, 2, 3)).min()) > 0.8
    augmented = objective.augment(ramp)
    slopes = (augmented[..., -1] - augmented[..., 0]).mean(dim=(1, 2))
    assert set(slopes.sign().int().tolist()) == {-1, 1}
    assert float(augmented.mean(dim=(1, 2, 3)).std()) > 3 * float(crops.mean(dim=(1, 2, 3)).std())


def test_queues_take_the_positive_keys_of_a_step_after_it_and_wrap() -> None:
    objective = make()
    before = objective.backbone.conv1.weight.clone()
    followed = objective.teacher.module[0].conv1.weight
    expected: list[list[Tensor]] = [[], [], []]
    for step in range(3):
        query, *keys = torch.rand(4, 6, 3, 16, 16)
        objective.crop, objective.augment = Fixed(query, keys[1]), Fixed(keys[0], keys[2])
        backbone, *heads = objective.teacher.module
        for rows, head, key in zip(expected, heads, keys, strict=True):
            rows.append(unit(head(backbone(key))))
        objective.training_loss(dates())
        assert [len(queue) for queue in objective.queues] == [min(10, 6 * step)] * 3
        with torch.no_grad():
            objective.backbone.conv1.weight.add_(1.0)
        objective.after_step()
    for rows, queue in zip(expected, objective.queues, strict=True):
        whole = torch.cat(rows).float()  # row t lies at t mod 10
        found = queue.features
        torch.testing.assert_close(found, torch.cat([whole[10:], whole[8:10]]), atol=1e-5, rtol=0)
    moved_by = 1 * 0.125 + 2 * 0.25 + 3 * 0.5  # half of what is left, of weights 1, 2 and 3 on
    torch.testing.assert_close(followed - before, torch.full_like(before, moved_by))


def test_the_loss_falls_and_features_are_of_the_first_date() -> None:
    objective, data = make(), dates()
    query, keys = objective.views(data["images"])
    objective.views = lambda _: (query, keys)
    optimiser = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        optimiser.zero_grad()
        loss = objective.training_loss(data)["loss"]
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    expected = objective.backbone(data["images"][:, 0])
    torch.testing.assert_close(objective.eval().embed(data), expected)
    assert [len(view) for view in objective.two_views(data)] == [6, 6]


@pytest.mark.parametrize("shape", [(6, 3, 16, 16), (6, 2, 3, 16, 16)])
def test_places_need_three_dates(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must have shape \(B, 3 or more, C, H, W\), got"):
        make().training_loss({"images": torch.rand(shape)})


def season_values(folder: Path, out: str) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    lines = ["place,day,image,label"]
    for place in range(8):
        for day in (20, 110, 200, 290):
            name = f"{place}-{day}.png"
            if not (folder / name).exists():
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / name)
            lines.append(f"{place},{day},{name},{place % 2}")
    (folder / "dates.csv").write_text("\n".join(lines) + "\n")
    return {
        "out": str(folder / out),
        "data": {"name": "seasons", "path": str(folder / "dates.csv"), "size": [16, 16]},
        "network": {"name": "resnet", "width": 4, "blocks": [1, 1], "norm": "group"},
        "objective": {"name": "season_contrast", **SMALL},
        "optimiser": {"lr": 0.01},
        "training": {"epochs": 4, "batch_size": 4, "log_every": 1, "progress": False},
        "watch": {"every": 4, "k": 3, "temperature": 0.07},
    }


@pytest.mark.filterwarnings("ignore:.*deterministic.*")
def test_a_run_over_places_hands_over_its_network(tmp_path: Path) -> None:
    run = fit(make_config(season_values(tmp_path, "run")))
    names = {name for _, _, name, _ in run.metrics()}
    assert {"loss/common", "loss/augmentation", "loss/season", "probe/knn"} <= names
    assert features.load(run.folder, layers=["1"])(torch.rand(1, 3, 16, 16))[0].shape == (
        1,
        8,
        4,
        4,
    )
