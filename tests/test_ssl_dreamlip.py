"""DreamLIP: texts that are drawn, the loss of each slot, and patches grouped by what is said."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

pytest.importorskip("lightning")
pytest.importorskip("kornia")

from pyfeat.ssl.networks import ResNet, ResNetOptions, ViT, ViTOptions
from pyfeat.ssl.parts import grouped_patches, grouping_weights
from tests.test_ssl_objectives import Fixed, cross_entropy, make, unit

VIT = ViTOptions(image_size=32, patch_size=8, width=24, heads=2, depth=2)
PLACES = ("top", "middle", "low", "left")


def data(size: int = 6) -> dict[str, Any]:
    """Images with a caption of their own and a long one of four sentences."""
    long = [". ".join(f"thing {i * j} is {place}" for j, place in enumerate(PLACES, 1))
            for i in range(1, size + 1)]  # fmt: skip
    return {
        "images": torch.rand(size, 3, 32, 32),
        "index": torch.arange(size),
        "texts": [[f"scene {i}", text] for i, text in enumerate(long)],
    }


def objective(images: Tensor, **options: Any) -> Any:
    made = make("dreamlip", backbone=ViT(VIT), out_dim=8, logit_scale=5.0, **options)
    made.augment = Fixed([images])
    return made


@pytest.mark.parametrize("backbone", [ViT(VIT), ResNet(ResNetOptions(width=4, blocks=(1, 1)))])
def test_patches_come_with_the_features(backbone: Any) -> None:
    images = torch.rand(2, 3, 32, 32)
    features, patches = backbone.eval().features_and_patches(images)
    torch.testing.assert_close(features, backbone(images))
    torch.testing.assert_close(patches, backbone.maps(images)[-1].flatten(2).mT)


def test_with_one_text_and_no_grouping_it_is_clip() -> None:
    batch = data()
    dream = objective(batch["images"], sub_captions=0, grouping_weight=0.0)
    clip = make("clip", backbone=ViT(VIT), out_dim=8, logit_scale=5.0)
    clip.load_state_dict(
        {n: x for n, x in dream.state_dict().items() if not n.startswith("grouping_loss")}
    )
    clip.augment = dream.augment
    first = {**batch, "texts": [texts[0] for texts in batch["texts"]]}
    loss, expected = dream.training_loss(batch)["loss"], clip.training_loss(first)["loss"]
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    assert not dream.grouping_loss.logit_scale.requires_grad
    for name, parameter in clip.named_parameters():
        other = dream.get_parameter(name)
        assert (other.grad is None) == (parameter.grad is None)
        assert (parameter.grad is None) != parameter.requires_grad
        if parameter.grad is not None:
            torch.testing.assert_close(other.grad, parameter.grad)


@pytest.mark.parametrize("duplicates", ["positive", "ignore"])
def test_texts_of_one_image_never_compete(duplicates: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = data()
    # In the third slot images 1 and 4 have the same text.
    drawn = [[texts[0], *texts[1].split(". ")[:3]] for texts in batch["texts"]]
    drawn[4][2] = drawn[1][2]
    rows = iter(drawn)
    monkeypatch.setattr("pyfeat.ssl.objectives.dreamlip.draw_captions", lambda *_, **__: next(rows))
    options = {"sub_captions": 3, "grouping_weight": 0.0, "duplicates": duplicates}
    dream = objective(batch["images"], **options)
    loss = dream.training_loss(batch)["loss"]
    images = unit(dream.encode_images(batch["images"]))
    expected = 0.0
    for j in range(4):
        logits = 5.0 * images @ unit(dream.encode_texts([row[j] for row in drawn])).T
        targets = torch.eye(6, dtype=torch.float64)
        if j == 2 and duplicates == "ignore":
            logits[1, 4] = logits[4, 1] = -1e9
        elif j == 2:
            targets[1, 4] = targets[4, 1] = 1.0
            targets = targets / targets.sum(1, keepdim=True)
        both = cross_entropy(targets, logits) + cross_entropy(targets, logits.T)
        expected += float(both) / 2 / 4
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("grouping", ["batch", "instance"])
@pytest.mark.parametrize("detach", [False, True])
def test_grouped_patches_find_their_texts(
    grouping: str, detach: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = data(5)
    drawn = [[texts[0], *texts[1].split(". ")[:2]] for texts in batch["texts"]]
    drawn[3][2] = drawn[3][1]  # a text drawn twice
    rows = iter(drawn)
    monkeypatch.setattr("pyfeat.ssl.objectives.dreamlip.draw_captions", lambda *_, **__: next(rows))
    options = {"sub_captions": 2, "contrast_weight": 0.0, "grouping_weight": 2.0}
    options |= {"duplicates": "ignore"}  # type: ignore[dict-item]
    dream = objective(batch["images"], grouping=grouping, detach_weights=detach, **options)
    losses = dream.training_loss(batch)
    loss = losses["loss"]
    torch.testing.assert_close(loss, 2 * losses["grouping"])

    patches = dream.encode_patches(batch["images"])
    texts = dream.encode_texts([text for row in drawn for text in row]).view(5, 3, -1)
    weights = grouping_weights(patches, texts)
    groups = functional.normalize(weights @ patches, dim=2).double()
    texts = functional.normalize(texts, dim=2).double()
    if grouping == "batch":
        logits = 5.0 * groups.flatten(0, 1) @ texts.flatten(0, 1).T
        targets = torch.eye(15, dtype=torch.float64)
        logits[10, 11] = logits[11, 10] = -1e9
        expected = cross_entropy(targets, logits) + cross_entropy(targets, logits.T)
    else:
        parts = []
        for i in range(5):
            logits = 5.0 * groups[i] @ texts[i].T
            if i == 3:
                logits[1, 2] = logits[2, 1] = -1e9
            eye = torch.eye(3, dtype=torch.float64)
            parts.append(cross_entropy(eye, logits) + cross_entropy(eye, logits.T))
        expected = torch.stack(parts).mean()
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    assert dream.grouping_loss.logit_scale.grad != 0.0
    assert dream.image_projection.weight.grad.abs().sum() > 0


def test_weights_of_patches_follow_their_formula() -> None:
    patches, texts = torch.randn(2, 9, 5, requires_grad=True), torch.randn(2, 4, 5)
    for threshold in (0.0, 0.4, None):
        least = 1 / 9 if threshold is None else threshold
        for pooling in ("minmax", "softmax"):
            weights = grouping_weights(patches, texts, pooling=pooling, threshold=threshold)
            torch.testing.assert_close(weights.sum(dim=2), torch.ones(2, 4))
            for b in range(2):
                for k in range(4):
                    cosines = functional.cosine_similarity(patches[b], texts[b, k], dim=1)
                    scaled = (cosines - cosines.min()) / (cosines.max() - cosines.min())
                    scaled = cosines.softmax(dim=0) if pooling == "softmax" else scaled
                    kept = torch.where(scaled >= least, scaled, 0.0)
                    expected = kept / kept.sum() if kept.sum() else torch.full_like(kept, 1 / 9)
                    torch.testing.assert_close(weights[b, k], expected)
    even = grouping_weights(torch.ones(1, 4, 3), torch.rand(1, 2, 3))
    torch.testing.assert_close(even, torch.full((1, 2, 4), 0.25))
    with pytest.raises(ValueError, match=r"must have shapes \(B, P, D\) and \(B, K, D\)"):
        grouping_weights(patches, texts[:, :, :4])
    with pytest.raises(ValueError, match="threshold must be at least 0, got -1"):
        grouping_weights(patches, texts, threshold=-1)


def test_a_gradient_flows_through_the_weights_unless_they_are_detached() -> None:
    patches = torch.randn(1, 6, 4, dtype=torch.float64, requires_grad=True)
    texts = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)

    def pooled(patches: Tensor, texts: Tensor) -> Tensor:
        return grouped_patches(patches, grouping_weights(patches, texts, threshold=0.0))

    assert torch.autograd.gradcheck(pooled, (patches, texts))
    weights = grouping_weights(patches, texts).detach()
    torch.autograd.backward(grouped_patches(patches, weights).square().sum())
    assert texts.grad is None


@pytest.mark.parametrize("grouping", ["batch", "instance"])
def test_the_order_of_sentences_does_not_matter(
    grouping: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, orders = data(), (slice(None), slice(None, None, -1))
    dream = objective(batch["images"], sub_captions=4, grouping=grouping)
    losses = []
    for order in orders:
        monkeypatch.setattr(
            "pyfeat.ssl.objectives.dreamlip.draw_captions",
            lambda captions, *_, order=order, **__: [
                captions[0], *captions[1].split(". ")[order]
            ],
        )  # fmt: skip
        losses.append(dream.training_loss(batch)["loss"])
    torch.testing.assert_close(*losses)


def test_the_loss_falls_and_captions_of_images_are_all_their_texts() -> None:
    batch = data(8)
    dream = objective(batch["images"], sub_captions=2)
    optimiser = torch.optim.AdamW(dream.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = dream.training_loss(batch)["loss"]
        torch.autograd.backward(loss)
        optimiser.step()
        losses.append(float(loss.detach()))
    assert all(map(math.isfinite, losses))
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    features, texts = dream.eval().embed_pairs(batch)
    assert features.shape == (8, 8)
    assert texts[2] == ["scene 2", *(f"thing {3 * j} is {p}" for j, p in enumerate(PLACES, 1))]
    assert dream.encode_patches(batch["images"]).shape == (8, 16, 8)


def test_what_has_no_list_of_captions_or_no_patches_is_refused() -> None:
    batch = data()
    dream = objective(batch["images"])
    for texts, got in ((["a"] * 6, "one; data.captions: all"), ([[]] * 6, "one"), (None, "none")):
        changed = {**batch, "texts": texts}
        with pytest.raises(ValueError, match=f"DreamLIP: data must have a list .*, got {got}"):
            dream.training_loss(changed)
    with pytest.raises(TypeError, match="backbone must have features_and_patches, got Flatten"):
        make("dreamlip", backbone=nn.Flatten())
