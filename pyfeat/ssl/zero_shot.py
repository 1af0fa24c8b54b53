"""What is asked of images and texts in one space: classes by prompts, and retrieval."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pyfeat._checks import check_count
from pyfeat.search import knn


class PromptClassifier:
    """Classes that are named by prompts, as nearest neighbours of images.

    Each prompt of a class is embedded and brought to length 1; their mean, again of length 1,
    stands for the class. It is computed once.

    Args:
        encode_texts: M texts to features (M, D), of any length, such as ``CLIP.encode_texts``.
        names: Of the C classes, distinct.
        templates: Prompts in which ``{}`` stands once, for the name.

    Attributes:
        names: As given.
        weights: (C, D) float32, of length 1.

    Raises:
        ValueError: If names are missing or equal, a template has not one ``{}``, or features of
            prompts are NaN, infinite or zero.

    Source: Radford et al., Learning transferable visual models from natural language supervision,
    ICML 2021, arXiv:2103.00020.

    Examples:
        >>> lengths = lambda texts: torch.tensor([[float(len(text)), 9.0] for text in texts])
        >>> classifier = PromptClassifier(lengths, ["cell", "transistor"], ["a {}", "one {}"])
        >>> classifier.predict(torch.tensor([[13.0, 9.0], [6.0, 9.0]]))
        tensor([[1],
                [0]])
    """

    def __init__(
        self,
        encode_texts: Callable[[Sequence[str]], Tensor],
        names: Sequence[str],
        templates: Sequence[str] = ("a photo of a {}.",),
    ) -> None:
        op = "PromptClassifier"
        if isinstance(names, str) or not names or len(set(names)) < len(names):
            message = f"{op}: names must be distinct texts, at least one, got {names!r}"
            raise ValueError(message)
        if isinstance(templates, str) or not templates:
            message = f"{op}: templates must be a sequence of texts, got {templates!r}"
            raise ValueError(message)
        for template in templates:
            if template.count("{}") != 1:
                message = f"{op}: templates must have one {{}} for the name, got {template!r}"
                raise ValueError(message)
        rows = []
        with torch.no_grad():
            for name in names:
                prompts = [template.replace("{}", name) for template in templates]
                mean = functional.normalize(encode_texts(prompts).float(), dim=1).mean(dim=0)
                if not 0.0 < float(mean.norm()) < float("inf"):
                    message = (
                        f"{op}: features of prompts must be finite and not zero, got "
                        f"{prompts[0]!r} with a mean of norm {float(mean.norm())}"
                    )
                    raise ValueError(message)
                rows.append(functional.normalize(mean, dim=0))
        self.names = list(names)
        self.weights = torch.stack(rows)

    def predict(self, images: Tensor, k: int = 1) -> Tensor:
        """Return the k nearest classes of each image, by cosine; ties go to the earlier class.

        Args:
            images: (N, D) features, of any length, on the device of the prompts'.
            k: 1 <= k <= C.

        Returns:
            (N, k) int64, nearest first.
        """
        return knn(images.detach().float(), self.weights, k, metric="cosine").indices

    def probabilities(self, images: Tensor, logit_scale: float = 100.0) -> Tensor:
        """Return the softmax over classes, (N, C) float32; the scale is that of training."""
        rows = functional.normalize(images.detach().float(), dim=1)
        return (logit_scale * rows @ self.weights.T).softmax(dim=1)

    def accuracy(self, images: Tensor, labels: Tensor, k: int = 1) -> float:
        """Return how often the label (N,) int64 is among the k nearest classes."""
        hits = (self.predict(images, k) == labels[:, None]).any(dim=1)
        return float(hits.double().mean())


class Recall(NamedTuple):
    """How often the k nearest hold one that belongs to the query, in [0, 1], by k."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]


def retrieval_recall(
    images: Tensor, texts: Tensor, pairs: Tensor | None = None, *, ks: Sequence[int] = (1, 5, 10)
) -> Recall:
    """Return the recall at k of texts by images and of images by texts.

    A query counts as found if one of its k nearest, by cosine and exact, belongs to it; queries to
    which nothing belongs do not count. Equal texts should stand there once, or ties decide:
    ``distinct_captions`` sees to that.

    Args:
        images: (N, D) float, of any length.
        texts: (M, D), dtype and device of ``images``.
        pairs: (P, 2) int64, an image and a text that belongs to it; None: the text of its index.
        ks: Numbers of neighbours, each at least 1; more than there are are all of them.

    Raises:
        ValueError: If shapes disagree, an index is out of range, or there are no pairs.

    Memory: as ``knn``; the matrix of similarities is never stored.
    Source: as CLIP, Radford et al., ICML 2021, arXiv:2103.00020.

    Examples:
        >>> retrieval_recall(torch.eye(3), torch.eye(3)[[0, 2, 1]], ks=(1, 2)).image_to_text[1]
        0.3333333333333333
    """
    op = "retrieval_recall"
    sizes = (len(images), len(texts))
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1]:
        message = (
            f"{op}: images and texts must have shapes (N, D) and (M, D), got "
            f"{tuple(images.shape)} and {tuple(texts.shape)}"
        )
        raise ValueError(message)
    for k in ks:
        check_count(op, "ks", k)
    if pairs is None:
        if sizes[0] != sizes[1]:
            message = f"{op}: texts must be as many as images without pairs, got {sizes}"
            raise ValueError(message)
        pairs = torch.arange(sizes[0])[:, None].expand(-1, 2)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs):
        message = f"{op}: pairs must have shape (P, 2), P at least 1, got {tuple(pairs.shape)}"
        raise ValueError(message)
    pairs = pairs.to(images.device)
    if bool((pairs < 0).any()) or bool((pairs >= pairs.new_tensor(sizes)).any()):
        low, high = pairs.min(dim=0).values.tolist(), pairs.max(dim=0).values.tolist()
        message = f"{op}: pairs must be below {sizes}, got {low} to {high}"
        raise ValueError(message)
    images, texts = images.detach(), texts.detach()
    return Recall(_found(images, texts, pairs, ks), _found(texts, images, pairs.flip(1), ks))


def _found(queries: Tensor, rows: Tensor, pairs: Tensor, ks: Sequence[int]) -> dict[int, float]:
    counted = torch.unique(pairs[:, 0])
    most = min(max(ks), len(rows))
    nearest = knn(queries[counted], rows, most, metric="cosine").indices
    # A pair is one number: that of its query times the rows, plus that of its row.
    hits = torch.isin(counted[:, None] * len(rows) + nearest, pairs[:, 0] * len(rows) + pairs[:, 1])
    return {k: float(hits[:, :k].any(dim=1).double().mean()) for k in ks}
