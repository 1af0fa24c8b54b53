"""Captions: sentences, prompts, retrieval, text models, and what a run on pairs shows."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

pytest.importorskip("lightning")
pytest.importorskip("kornia")

from pyfeat.ssl.config import make_config
from pyfeat.ssl.networks.pretrained_text import PretrainedText
from pyfeat.ssl.objectives.clip import CLIP
from pyfeat.ssl.parts import (
    caption_ids,
    caption_pool,
    distinct_captions,
    draw_captions,
    split_sentences,
)
from pyfeat.ssl.runs import Run
from pyfeat.ssl.training import fit
from pyfeat.ssl.zero_shot import PromptClassifier, retrieval_recall
from tests.support_ssl import save_text_model

pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic.*")


def test_sentences_end_at_stops_lines_and_markers() -> None:
    assert split_sentences("One. Two\nThree.</s>  \n. ") == ["One", "Two", "Three"]
    assert split_sentences("2.5 mm of v1.2.") == ["2.5 mm of v1.2"]
    assert split_sentences(" . \n") == []


def test_the_pool_is_what_is_said_beside_the_first_caption() -> None:
    assert caption_pool(["own", "A. B.", "C"]) == ["A", "B", "C"]
    assert caption_pool(["A. B."]) == ["A", "B"]
    assert caption_pool(["own", " . "]) == ["own"]
    assert caption_pool(["."]) == ["."]


def test_sentences_are_drawn_once_each_and_the_last_one_too() -> None:
    captions = ["own", "A. B. C. D"]
    seen = set()
    for _ in range(50):
        first, *drawn = draw_captions(captions, 3)
        assert first == "own"
        assert len(set(drawn)) == 3
        seen |= set(drawn)
    assert seen == set("ABCD")
    drawn = draw_captions(captions, 9)[1:]
    assert len(drawn) == 9
    assert set(drawn) <= set("ABCD")
    pairs = {text for _ in range(50) for text in draw_captions(captions, 3, merge=2)[1:]}
    assert pairs == {"A. B", "B. C", "C. D"}
    assert draw_captions(captions, 1, merge=9)[1] == "A. B. C. D"
    assert draw_captions(captions, 0) == ["own"]


def test_captions_have_numbers_of_their_own() -> None:
    ids = caption_ids(["a", "b", "a", ""])
    assert ids.dtype == torch.int64
    assert ids[0] == ids[2]
    assert len(set(ids.tolist())) == 3
    assert caption_ids(["a"]).tolist() == ids[:1].tolist()


def test_equal_texts_stand_once_and_belong_to_all_their_images() -> None:
    texts, pairs = distinct_captions([["a", "b", "a"], [], ["b"]])
    assert texts == ["a", "b"]
    assert pairs.tolist() == [[0, 0], [0, 1], [2, 1]]
    assert distinct_captions([[]])[1].shape == (0, 2)


def _letters(texts: Sequence[str]) -> Tensor:
    """How often each letter stands in a text, of a length that differs."""
    rows = [[float(text.count(letter)) for letter in "abcdef"] for text in texts]
    return torch.tensor(rows) * torch.tensor([[1.0 + len(text)] for text in texts])


def test_prompts_are_normalised_before_and_after_their_mean() -> None:
    templates = ["a {} b", "cc {}", "{}"]
    classifier = PromptClassifier(_letters, ["d", "eef"], templates)
    for weights, name in zip(classifier.weights, ["d", "eef"], strict=True):
        rows = [_letters([t.replace("{}", name)]) for t in templates]
        mean = sum(row / row.norm() for row in rows) / 3
        torch.testing.assert_close(weights[None], mean / mean.norm())
    images = torch.rand(9, 6)
    cosines = functional.normalize(images, dim=1) @ classifier.weights.T
    assert torch.equal(classifier.predict(images)[:, 0], cosines.argmax(dim=1))
    torch.testing.assert_close(classifier.probabilities(images, 3.0), (3 * cosines).softmax(dim=1))
    labels = cosines.argmin(dim=1)
    assert classifier.accuracy(images, labels) == 0.0
    assert classifier.accuracy(images, labels, k=2) == 1.0


@pytest.mark.parametrize(
    ("names", "templates", "error"),
    [
        (["a", "a"], ["{}"], r"names must be distinct texts, at least one, got \['a', 'a'\]"),
        ([], ["{}"], "names must be distinct"),
        ("ab", ["{}"], "names must be distinct"),
        (["a"], [], "templates must be a sequence of texts"),
        (["a"], ["a {} of {}"], r"templates must have one {} for the name, got 'a {} of {}'"),
        (["x"], ["{}"], "features of prompts must be finite and not zero, got 'x'"),
    ],
)
def test_prompts_are_refused(names: Any, templates: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        PromptClassifier(_letters, names, templates)


def test_recall_is_that_of_brute_force() -> None:
    images, texts = torch.randn(30, 4), torch.randn(50, 4)
    belongs = torch.rand(30, 50) < 0.05
    belongs[3], belongs[:, 7] = False, False  # these do not count
    recall = retrieval_recall(images, texts, belongs.nonzero(), ks=(1, 4, 99))
    similar = functional.normalize(images, dim=1) @ functional.normalize(texts, dim=1).T
    for found, similarities, wanted in (
        (recall.image_to_text, similar, belongs),
        (recall.text_to_image, similar.T, belongs.T),
    ):
        for k in (1, 4):
            nearest = similarities.topk(k, dim=1).indices
            hits = wanted.gather(1, nearest).any(dim=1)[wanted.any(dim=1)]
            assert found[k] == pytest.approx(float(hits.double().mean()))
        assert found[99] == 1.0


@pytest.mark.parametrize(
    ("shapes", "pairs", "error"),
    [
        (((2, 3), (2, 4)), None, r"must have shapes \(N, D\) and \(M, D\)"),
        (((2, 3), (4, 3)), None, r"texts must be as many as images without pairs, got \(2, 4\)"),
        (((2, 3), (4, 3)), [[0, 4]], r"pairs must be below \(2, 4\), got \[0, 4\] to \[0, 4\]"),
        (((2, 3), (4, 3)), [[-1, 0]], r"pairs must be below"),
        (((2, 3), (4, 3)), [], r"pairs must have shape \(P, 2\), P at least 1"),
    ],
)
def test_retrieval_is_refused(shapes: Any, pairs: Any, error: str) -> None:
    given = None if pairs is None else torch.tensor(pairs).long().view(-1, 2)
    with pytest.raises(ValueError, match=error):
        retrieval_recall(torch.ones(shapes[0]), torch.ones(shapes[1]), given)
    with pytest.raises(ValueError, match="ks must be at least 1, got 0"):
        retrieval_recall(torch.eye(2), torch.eye(2), ks=(0,))


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return save_text_model(tmp_path_factory.mktemp("text") / "model")


def test_features_of_a_text_are_the_mean_of_its_tokens(text_model: Path) -> None:
    text = PretrainedText(str(text_model), trained=True).eval()
    alone, padded = text.encode(["a cell"]), text.encode(["a cell", "a very dark cell"])
    torch.testing.assert_close(padded[:1], alone)
    tokens = text._tokenizer("a cell", return_tensors="pt")
    states = text.model(**tokens).last_hidden_state
    torch.testing.assert_close(alone, states.mean(dim=1))
    assert alone.requires_grad
    assert text.encode([]).shape == (0, text.feature_dim)
    short = PretrainedText(str(text_model), length=2).encode(["a very", "a very dark cell"])
    assert torch.equal(short[0], short[1])


def test_a_frozen_text_model_reads_each_text_once_and_to_the_same_bits(text_model: Path) -> None:
    text = PretrainedText(str(text_model)).train()
    assert not text.model.training
    read: list[list[str]] = []
    original = text._read

    def counted(texts: Sequence[str]) -> Tensor:
        read.append(list(texts))
        return original(texts)

    text._read = counted  # type: ignore[method-assign]
    first = text.encode(["a cell", "a dark cell", "a cell"])
    assert read == [["a cell"], ["a dark cell"]]
    assert torch.equal(text.encode(["a cell"])[0], first[0])
    assert len(read) == 2
    assert not first.requires_grad
    assert not any(parameter.requires_grad for parameter in text.parameters())
    again = PretrainedText(str(text_model))
    again.load_state_dict({name: 2 * x for name, x in text.state_dict().items()})
    assert not torch.equal(again.encode(["a cell"])[0], first[0])
    again.load_state_dict(text.state_dict())
    assert torch.equal(again.encode(["a cell"])[0], first[0])


def _pairs(folder: Path) -> Path:
    """24 images that are dark or bright, each with two captions that say so."""
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for i in range(24):
            Image.new("RGB", (16, 16), (i + 200 * (i % 2),) * 3).save(folder / f"{i}.png")
            kind = ("dark", "bright")[i % 2]
            writer.writerows([(f"{i}.png", f"a very {kind} cell"), (f"{i}.png", f"it is {kind}")])
    return folder / "pairs.csv"


def _config(pairs: Path, out: Path, **objective: Any) -> Any:
    return make_config(
        {
            "out": str(out),
            "data": {"name": "pairs", "path": str(pairs), "size": [16, 16]},
            "network": {"name": "resnet", "width": 4, "blocks": [1, 1]},
            "objective": {"name": "clip", "out_dim": 8, "min_scale": 0.9, **objective},
            "optimiser": {"lr": 0.02},
            "training": {"epochs": 8, "batch_size": 12, "log_every": 1, "progress": False},
            "watch": {"every": 8, "samples": 24},
        }
    )


def test_a_run_on_pairs_shows_retrieval_and_gives_what_zero_shot_takes(
    tmp_path: Path, text_model: Path
) -> None:
    pairs = _pairs(tmp_path)
    run = fit(_config(pairs, tmp_path / "run", text_model=str(text_model)))
    figures = {name: value for step, _, name, value in run.metrics() if step == 16}
    names = {f"retrieval/{way}@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 10)}
    assert names <= set(figures)
    assert figures["retrieval/image_to_text@10"] == 1.0  # of no more than four texts
    model: CLIP = Run(run.folder).objective()
    assert not model.training
    images = torch.tensor([0.05, 0.85]).view(2, 1, 1, 1).expand(2, 3, 16, 16)
    classifier = PromptClassifier(model.encode_texts, ["dark", "bright"], ["a {}", "it is {}"])
    assert classifier.accuracy(model.encode_images(images), torch.tensor([0, 1])) == 1.0


def test_data_that_do_not_suit_clip_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path)
    config = _config(pairs, tmp_path / "run")
    for data, error in (
        ({"name": "pairs", "path": str(pairs), "captions": "all"}, "one caption for each image, got a list"),
        ({"name": "images", "path": str(tmp_path)}, "one caption for each image, got none"),
    ):  # fmt: skip
        values = {"out": config.out, "data": data, "network": {"name": "resnet"}}
        values |= {"objective": {"name": "clip"}, "training": {"batch_size": 8}}
        with pytest.raises(ValueError, match=f"CLIP: data must have {error}"):
            fit(make_config(values))
        assert not Path(config.out).exists()
