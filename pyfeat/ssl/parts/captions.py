"""What is said of images: sentences of captions, and which texts belong to which image."""

import hashlib
import re
from collections.abc import Sequence

import torch
from torch import Tensor

# A full stop ends a sentence before a space only: "0.5 mm" has none. Models end texts with </s>.
_ENDS = re.compile(r"\n|</s>|\.(?=\s|$|</s>)")


def split_sentences(text: str) -> list[str]:
    r"""Return the sentences of a text, without their full stops; empty ones are left out.

    Examples:
        >>> split_sentences("A seven is red. It is 2.5 mm wide.\n\nA nine</s>")
        ['A seven is red', 'It is 2.5 mm wide', 'A nine']
    """
    return [part.strip() for part in _ENDS.split(text) if part.strip()]


def caption_pool(captions: Sequence[str]) -> list[str]:
    """Return the sentences of all captions but the first, which is the image's own.

    Args:
        captions: At least one: the image's own, then short and long ones.

    Returns:
        Sentences in order; of the only caption, if there are no others.
    """
    return [s for caption in captions[1:] for s in split_sentences(caption)] or (
        split_sentences(captions[0]) or [captions[0]]
    )


def draw_captions(captions: Sequence[str], count: int, *, merge: int = 1) -> list[str]:
    """Return the first caption, and sentences of the others, drawn.

    Draws without replacement, from torch's generator of the CPU; with replacement if there are
    fewer than ``count``.

    Args:
        captions: As in ``caption_pool``.
        count: Sentences to draw, at least 0.
        merge: So many sentences in a row, from the one drawn on, are joined to one text, at least 1.

    Returns:
        1 + ``count`` texts.

    Source: Zheng et al., DreamLIP, ECCV 2024, arXiv:2403.17007.
    """
    pool = caption_pool(captions)
    starts = max(1, len(pool) - merge + 1)
    drawn = torch.randperm(starts) if starts >= count else torch.randint(starts, (count,))
    joined = [". ".join(pool[start : start + merge]) for start in drawn[:count].tolist()]
    return [captions[0], *joined]


def caption_ids(texts: Sequence[str]) -> Tensor:
    """Return a number for each caption, equal for equal ones, also in other processes.

    Returns:
        (B,) int64 on the CPU.
    """
    digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
    return torch.tensor([int.from_bytes(each, "big", signed=True) for each in digests]).long()


def distinct_captions(captions: Sequence[Sequence[str]]) -> tuple[list[str], Tensor]:
    """Return every text once, and which images it is said of.

    Args:
        captions: Those of each image.

    Returns:
        M texts, and (P, 2) int64, pairs of an image and a text, for ``retrieval_recall``.

    Examples:
        >>> distinct_captions([["a", "b"], ["b"]])
        (['a', 'b'], tensor([[0, 0],
                [0, 1],
                [1, 1]]))
    """
    places: dict[str, int] = {}
    pairs = {
        (image, places.setdefault(text, len(places))): None
        for image, texts in enumerate(captions)
        for text in texts
    }
    return list(places), torch.tensor(list(pairs)).long().view(-1, 2)
