"""The losses of LSFA one by one, and the training that they make."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pyfeat.anomaly.adaptation import AdaptationRun, AdaptorSet, PatchStore
from pyfeat.anomaly.adaptors import (
    Adaptation,
    Adaptor,
    alignment,
    compactness,
    means_of,
    spread_of,
)
from pyfeat.anomaly.sample_features import SampleFeatures
from tests.support_lsfa import GRID, QUICK, SIZE, Cells, plates

NUM_PATCHES = GRID[0] * GRID[1]


def store_of(*categories: str, train: int = 6) -> PatchStore:
    store = PatchStore()
    read = SampleFeatures({"rgb": Cells(), "xyz": Cells()}, (SIZE, SIZE), 4, op="op", strict=True)
    for category in categories or ("plate",):
        for batch in read(plates(train=train, good=0, defective=0, category=category)):
            store.add(batch)
    return store


def run_on(store: PatchStore, options: Adaptation = QUICK, seed: int = 0) -> AdaptationRun:
    scales = {m: store.centre_and_scale(m) for m in store.modalities}
    torch.manual_seed(seed)
    return AdaptationRun(store, AdaptorSet(scales, options.heads), options, seed=seed)


def test_an_adaptor_begins_as_the_identity_and_looks_at_all_patches_of_a_sample() -> None:
    adaptor = Adaptor(24)
    patches = torch.randn(2, 5, 24)
    assert adaptor.heads == 12
    assert Adaptor(33).heads == 11
    assert torch.equal(adaptor(patches), patches)
    for layer in (adaptor.project, adaptor.narrow):
        torch.nn.init.normal_(layer.weight)
    changed = patches.clone()
    changed[0, 3, 0] += 1
    difference = (adaptor(changed) - adaptor(patches)).abs().amax(dim=2)
    assert (difference[0] > 1e-4).all()
    assert not difference[1].any()
    order = torch.tensor([4, 2, 0, 1, 3])
    assert torch.allclose(adaptor(patches)[:, order], adaptor(patches[:, order]), atol=1e-4)


def aligned(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Symmetric InfoNCE of rows (n, P), by the whole matrix, times twice the temperature."""
    a, b = (torch.nn.functional.normalize(x.double(), dim=1) for x in (first, second))
    logits = a @ b.T / temperature
    own = torch.arange(len(a))
    each = [torch.nn.functional.cross_entropy(x, own) for x in (logits, logits.T)]
    return 2 * temperature * (each[0] + each[1]) / 2


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_alignment_tells_valid_patches_of_the_whole_batch_apart(temperature: float) -> None:
    first, second = torch.randn(2, 7, 5), torch.randn(2, 7, 5)
    valid = torch.rand(2, 7) < 0.7
    found = alignment(first, second, valid, temperature=temperature)
    assert found.item() == pytest.approx(
        float(aligned(first[valid], second[valid], temperature)), rel=1e-5
    )
    spoiled = first.clone()
    spoiled[~valid] = 1e3
    assert torch.equal(alignment(spoiled, second, valid, temperature=temperature), found)


def test_alignment_may_be_told_to_compare_patches_of_one_sample_only() -> None:
    first, second = torch.randn(2, 7, 5), torch.randn(2, 7, 5)
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[1, 2:] = False
    found = alignment(first, second, valid, temperature=1.0, negatives="sample")
    parts = [(7, aligned(first[0], second[0], 1.0)), (2, aligned(first[1, :2], second[1, :2], 1.0))]
    assert found.item() == pytest.approx(sum(n * float(x) for n, x in parts) / 9, rel=1e-5)


def test_alignment_of_a_single_patch_is_nothing() -> None:
    valid = torch.zeros(1, 7, dtype=torch.bool)
    valid[0, 4] = True
    first, second = torch.randn(1, 7, 5), torch.randn(1, 7, 5)
    assert alignment(first, second, valid, temperature=1.0) == 0


def test_compactness_is_the_mean_distance_to_rows_of_other_samples() -> None:
    patches = torch.randn(3, 5, 4, requires_grad=True)
    valid = torch.rand(3, 5) < 0.6
    rows, of_samples = torch.randn(9, 4), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    memories = [(rows, of_samples), None, (rows, of_samples)]
    numbers = torch.tensor([0, 1, 7])
    found = compactness(patches, valid, numbers, memories, 2.0)
    every = torch.cdist(patches.detach(), rows.expand(3, -1, -1))
    own = every[0, :, 3:].amin(dim=1).clamp(max=2.0)[valid[0]]
    foreign = every[2].amin(dim=1).clamp(max=2.0)[valid[2]]
    assert found.item() == pytest.approx(float(torch.cat([own, foreign]).mean()), rel=1e-5)
    torch.autograd.backward(found)
    assert patches.grad is not None
    assert not patches.grad[1].any()
    assert not patches.grad[~valid].any()


def test_compactness_has_the_gradient_of_finite_differences() -> None:
    patches = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    rows, samples = torch.randn(8, 3, dtype=torch.float64), torch.arange(8)
    valid = torch.tensor([[True, True, False, True]])
    held = [(rows, samples)]
    assert torch.autograd.gradcheck(
        lambda p: compactness(p, valid, torch.tensor([2]), held, 9.0), (patches,)
    )


def test_a_sample_without_rows_of_others_is_not_compared() -> None:
    valid = torch.ones(1, 4, dtype=torch.bool)
    held = [(torch.randn(3, 2), torch.full((3,), 5))]
    assert compactness(torch.randn(1, 4, 2), valid, torch.tensor([5]), held, 1.0) == 0


@pytest.mark.parametrize("relative", [True, False])
def test_relative_compactness_does_not_fall_when_all_patches_shrink(relative: bool) -> None:
    store = store_of()
    run = run_on(store, replace(QUICK, relative=relative, start_step=0, max_distance=99.0))
    numbers = torch.arange(4)
    valid = store.valid(numbers)
    taken = {m: torch.randn(4, NUM_PATCHES, store.dim(m)) for m in ("rgb", "xyz")}
    parts = []
    for factor in (1.0, 0.5):
        run.memories = run._fresh_memories()
        scaled = {m: factor * rows for m, rows in taken.items()}
        run._remember(torch.tensor([5, 4, 3, 2]), {m: 1.1 * rows for m, rows in scaled.items()})
        parts.append(run._losses(numbers, taken, scaled, valid)["compactness rgb"].item())
    assert parts[0] > 0
    assert parts[1] / parts[0] == pytest.approx(1.0 if relative else 0.5, rel=0.01)


def test_relative_compactness_is_the_distance_where_nothing_is_adapted_yet() -> None:
    store = store_of()
    numbers = torch.arange(4)
    valid = store.valid(numbers)
    taken = {m: torch.randn(4, NUM_PATCHES, store.dim(m)) for m in ("rgb", "xyz")}
    adapted = {m: rows.clone().requires_grad_() for m, rows in taken.items()}
    found = []
    for relative in (True, False):
        run = run_on(store, replace(QUICK, relative=relative, start_step=0, max_distance=99.0))
        run._remember(torch.tensor([5, 4, 3, 2]), {m: 2 * rows + 1 for m, rows in taken.items()})
        found.append(run._losses(numbers, taken, adapted, valid)["compactness rgb"])
    assert found[0].item() == pytest.approx(found[1].item(), rel=1e-5)
    # The two differ in what they gain from narrower patches: the relative one pays for it.
    (paid,), (free,) = (torch.autograd.grad(loss, adapted["rgb"]) for loss in found)
    spread = torch.log(spread_of(adapted["rgb"], valid))
    (narrower,) = torch.autograd.grad(spread, adapted["rgb"])
    assert torch.allclose(paid, free - found[1].detach() * narrower, atol=1e-6)


def test_negatives_of_alignment_are_of_the_same_sample_unless_told() -> None:
    store = store_of()
    numbers, run = torch.arange(4), run_on(store)
    valid = store.valid(numbers)
    taken = {m: torch.randn(4, NUM_PATCHES, store.dim(m)) for m in ("rgb", "xyz")}
    first, second = (run.heads[m](rows) for m, rows in taken.items())
    expected = alignment(first, second, valid, temperature=1.0, negatives="sample")
    found = run._losses(numbers, taken, taken, valid)["local alignment"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_spread_is_over_all_directions_alike() -> None:
    patches = torch.randn(3, 40, 4)
    valid = torch.rand(3, 40) < 0.7
    found = spread_of(patches, valid)
    directions = torch.linalg.svdvals(patches[valid] - patches[valid].mean(dim=0))
    variances = directions.double().square() / valid.sum() + 1e-3
    assert found.item() == pytest.approx(float(variances.log().mean().exp().sqrt()), rel=1e-5)
    # One direction 8 times as wide, the others half: what counts for distances, their mean, grows.
    changed = patches * torch.tensor([8.0, 0.5, 0.5, 0.5])
    assert spread_of(changed, valid).item() == pytest.approx(found.item(), rel=0.01)
    exact = patches.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: spread_of(rows, valid), (exact,))
    alike = torch.ones(3, 40, 4)
    assert spread_of(alike, valid).item() == pytest.approx(1e-3**0.5, rel=1e-5)


def test_means_are_over_valid_patches() -> None:
    patches = torch.tensor([[[1.0], [3.0], [100.0]]])
    assert means_of(patches, torch.tensor([[True, True, False]])).tolist() == [[2.0]]


def test_memories_hold_valid_patches_of_their_own_class_after_adaptation() -> None:
    store = store_of("disc", "plate")
    run = run_on(store)
    run.train()
    valid = store.valid(range(12))
    for modality in ("rgb", "xyz"):
        memories = run.memories[modality]
        assert sorted(memories.categories) == ["disc", "plate"]
        for category, numbers in (("disc", range(6)), ("plate", range(6, 12))):
            samples = memories.samples(category)
            assert set(samples.tolist()) <= set(numbers)
            latest = int(samples[-1])  # rows of a sample lie together, in the order of patches
            count = int(valid[latest].sum())
            rows = memories.rows(category)[samples == latest]
            assert len(rows) <= count
        means = run.memories[f"{modality} means"]
        assert means.rows("disc").shape == (6, 6)


def test_compactness_starts_late_and_sees_nothing_of_its_own_step() -> None:
    store = store_of()
    options = replace(QUICK, epochs=4, batch_size=3, start_step=0, start_fill=0.3)
    run = run_on(store, options)
    run.train()
    # Nothing is remembered yet in the first step, whose own patches are put in after it.
    assert run.losses[0]["compactness rgb"] == 0
    assert run.losses[1]["compactness rgb"] > 0
    assert run.losses[1]["global compactness xyz"] > 0
    late = run_on(store, replace(options, start_step=3))
    late.train()
    assert ["compactness rgb" in each for each in late.losses[:4]] == [False] * 3 + [True]
    after_a_pass = run_on(store, replace(options, start_step=None))
    after_a_pass.train()
    assert ["compactness rgb" in each for each in after_a_pass.losses[:3]] == [False, False, True]
    full = run_on(store, replace(options, start_fill=1.0))
    full.train()
    # Of two steps, the first half of the samples fills half of the memory, and the second the rest.
    assert [each["compactness rgb"] > 0 for each in full.losses[:3]] == [False, False, True]


def test_training_brings_down_what_it_is_told_to() -> None:
    store = store_of()
    # All samples in every step: values of different samples say nothing of training.
    options = replace(QUICK, epochs=30, batch_size=6, learning_rate=3e-3, temperature=0.2)
    alone = {
        "local alignment": replace(options, compactness=0.0),
        "compactness rgb": replace(options, local_alignment=0.0, global_alignment=0.0),
    }
    for part, chosen in alone.items():
        run = run_on(store, chosen)
        run.train()
        values = [each[part] for each in run.losses if each.get(part, 0) > 0]
        assert values[-1] < 0.95 * values[0]
        names = {name for each in run.losses for name in each} - {"none"}
        assert all(("alignment" in name) == ("alignment" in part) for name in names)


def test_equal_seeds_give_equal_adaptors() -> None:
    store = store_of()
    weights = []
    for seed in (0, 0, 1):
        run = run_on(store, seed=seed)
        run.train()
        weights.append(run.adaptors.state_dict()["adaptors.rgb.narrow.weight"].clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_store_gives_back_what_came_in() -> None:
    store = store_of()
    (batch,) = SampleFeatures(
        {"rgb": Cells(), "xyz": Cells()}, (SIZE, SIZE), 9, op="op", strict=True
    )(plates(train=6, good=0, defective=0))
    for modality, features in batch.features.items():
        assert torch.equal(store.patches(modality, [4, 1]), features[[4, 1]])
        rows = features[batch.valid]
        centre, scale = store.centre_and_scale(modality)
        assert torch.allclose(centre, rows.mean(dim=0), atol=1e-5)
        assert scale == pytest.approx(float((rows - centre).square().mean().sqrt()), rel=1e-5)
    assert torch.equal(store.valid([4, 1]), batch.valid[[4, 1]])
    assert [b.tolist() for b in store.batches(4)] == [[0, 1, 2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "Adaptation: epochs must be at least 1, got 0"),
        ({"compactness": -1.0}, "Adaptation: compactness must be finite and at least 0, got -1.0"),
        ({"temperature": 0.0}, "Adaptation: temperature must be positive and finite, got 0.0"),
        ({"warmup": 1.0}, r"Adaptation: warmup must be in \[0, 1\), got 1.0"),
        ({"start_fill": 0.0}, r"Adaptation: start_fill must be in \(0, 1\], got 0.0"),
        ({"negatives": "all"}, "Adaptation: negatives must be one of 'batch', 'sample', got 'all'"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_wrong_option_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adaptation(**options)  # type: ignore[arg-type]
