"""Rendered plates: the same from one seed, and each defect where its mask says and nowhere else."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from pyfeat.anomaly import Dataset, Sample, synthesise
from pyfeat.anomaly.synthesis import DEFECTS, Plate

SIZE = 64


def plates(**options: object) -> list[Sample]:
    return [record.load() for record in synthesise(size=SIZE, **options)]  # type: ignore[arg-type]


def undamaged(sample: Sample, *, seed: int) -> tuple[Tensor, Tensor]:
    """Colours and heights of the same defective plate at a severity that shows nothing."""
    number = int(sample.name.rpartition("/")[2])
    twin = Plate("plate", sample.split, sample.kind, number, seed, (SIZE, SIZE), 1e-9).load()
    assert twin.xyz is not None
    return twin.rgb, twin.xyz[2]


def test_equal_seeds_give_equal_samples_whatever_the_counts() -> None:
    few = plates(train=2, good=1, defective=3, seed=5)
    many = {sample.name: sample for sample in plates(train=4, good=3, defective=6, seed=5)}
    other = {sample.name: sample for sample in plates(train=2, good=1, defective=3, seed=6)}
    for sample in few:
        twin = many[sample.name]
        for mine, its in ((sample.rgb, twin.rgb), (sample.xyz, twin.xyz), (sample.mask, twin.mask)):
            assert mine is not None
            assert its is not None
            assert torch.equal(mine, its)
        assert not torch.equal(sample.rgb, other[sample.name].rgb)


def test_no_two_samples_show_the_same_plate() -> None:
    images = [sample.rgb for sample in plates(train=3, good=3, defective=3)]
    for one, other in combinations(images, 2):
        assert (one - other).abs().mean() > 0.02


def test_a_set_says_what_its_samples_are() -> None:
    dataset = synthesise(train=2, good=1, defective=4, size=(32, 48), category="disc")
    assert repr(dataset) == "Dataset(disc: 2 train, 0 validation, 5 test)"
    assert [record.kind for record in dataset] == ["good"] * 3 + [*DEFECTS, "dent"]
    assert len({record.name for record in dataset}) == 7
    for record in dataset:
        sample = record.load()
        assert (sample.category, sample.split, sample.kind) == ("disc", record.split, record.kind)
        assert sample.defective == record.defective == (record.kind != "good")
        assert sample.mask is not None
        assert sample.mask.any() == sample.defective
        assert sample.rgb.shape == (3, 32, 48)


@pytest.mark.parametrize("kind", DEFECTS)
def test_a_defect_shows_in_its_own_modalities_and_within_its_mask(kind: str) -> None:
    seed = 3
    for sample in plates(train=0, good=0, defective=4, seed=seed, defects=(kind,)):
        assert sample.xyz is not None
        assert sample.mask is not None
        colours, heights = undamaged(sample, seed=seed)
        change = (sample.rgb - colours).norm(dim=0)
        sunk = (sample.xyz[2] - heights) * (sample.xyz[2] > 0)
        for shown, amount, least in ((kind != "dent", change, 0.2), (kind != "stain", sunk, 1.0)):
            if not shown:
                assert amount.abs().max() < 1e-4
                continue
            assert amount.max() > least
            # What lies outside of the mask is at most the share of the full strength that it leaves.
            assert amount[~sample.mask].abs().max() < 0.45 * amount.max()
        assert 4 <= int(sample.mask.sum()) < 0.1 * sample.mask.numel()


def test_points_are_zero_off_the_plate_and_lie_on_the_pixel_grid_elsewhere() -> None:
    (sample,) = plates(train=1, good=0, defective=0)
    assert sample.xyz is not None
    x, y, z = sample.xyz
    seen = z > 0
    assert 0.5 < seen.float().mean() < 0.9
    assert not seen[0].any()
    assert (x[~seen] == 0).all()
    assert (y[~seen] == 0).all()
    beside = seen[:, 1:] & seen[:, :-1]
    assert torch.allclose((x[:, 1:] - x[:, :-1])[beside], torch.ones(()), atol=1e-4)
    assert (sample.rgb.mean(dim=0)[seen].mean() - sample.rgb.mean(dim=0)[~seen].mean()) > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": -1}, "synthesise: train must be at least 0, got -1"),
        ({"size": 8}, "synthesise: size must be at least 16, got 8"),
        ({"severity": 0.0}, "synthesise: severity must be positive and finite, got 0.0"),
        ({"severity": float("nan")}, "synthesise: severity must be positive and finite, got nan"),
        ({"defects": ()}, "synthesise: defects must name at least one, got none"),
        ({"defects": ("hole",)}, "synthesise: defects must be one of 'dent', .*, got 'hole'"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_wrong_argument_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        synthesise(**options)  # type: ignore[arg-type]


def test_a_sample_whose_tensors_disagree_is_refused() -> None:
    rgb = torch.zeros(3, 4, 5)
    facts = ("a", "plate", "train", "good", False)
    with pytest.raises(
        ValueError, match=r"Sample: xyz must have shape \(3, 4, 5\), got \(3, 5, 4\)"
    ):
        Sample(*facts, rgb, torch.zeros(3, 5, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Sample: mask must have shape \(4, 5\), got \(4, 4\)"):
        Sample(*facts, rgb, None, torch.zeros(4, 4, dtype=torch.bool))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Sample: rgb must be float32, got float64 in a"):
        Sample(*facts, rgb.double())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Sample: xyz must be finite, got NaN or infinity in a"):
        Sample(*facts, rgb, torch.full((3, 4, 5), torch.nan))  # type: ignore[arg-type]


def test_clashing_records_are_refused() -> None:
    def plate(category: str, number: int = 0) -> Plate:
        return Plate(category, "train", "good", number, 0, (16, 16), 1.0)

    with pytest.raises(ValueError, match="names must be unique, got 'plate/train/good/000' twice"):
        Dataset([plate("plate"), plate("plate")])
    with pytest.raises(ValueError, match="must differ in more than case, got 'plate' and 'Plate'"):
        Dataset([plate("plate"), plate("Plate")])
    with pytest.raises(ValueError, match=r"Dataset.select: category must be one of None, 'plate'"):
        Dataset([plate("plate")]).select(category="disc")
