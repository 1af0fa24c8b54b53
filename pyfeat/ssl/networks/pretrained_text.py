"""Text models that others have trained, through transformers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyfeat._backbones.body import hash_weights
from pyfeat._extras import require

# 100 MB of features of 384 numbers.
_MOST_KEPT = 65536
# What models that do not learn have read on the CPU, by name, length and hash of the weights.
_READ: dict[tuple[str, int, str], dict[str, Tensor]] = {}


class PretrainedText(nn.Module):
    """A text model of transformers, whose features are the mean of its tokens'.

    One that does not learn reads each text alone on the CPU, and once in a process: the bits of
    features, and of a run that is resumed, then do not depend on what was read together. Elsewhere
    texts are read together and nothing is kept.

    Args:
        name: Folder, or name on the Hub, of a model with a fast tokenizer.
        length: Most tokens of a text; the rest is cut off.
        trained: Let its weights learn.

    Attributes:
        feature_dim: D.

    Raises:
        ImportError: If transformers is not installed.
        OSError: If the model is neither on this machine nor on the Hub.

    Source: Reimers and Gurevych, Sentence-BERT, EMNLP 2019, arXiv:1908.10084, for the mean.
    """

    def __init__(self, name: str, *, length: int = 96, trained: bool = False) -> None:
        super().__init__()
        transformers = require("transformers", extra="hf", op="PretrainedText")
        self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(name)
        self.model: Any = transformers.AutoModel.from_pretrained(name).float()
        if getattr(self.model, "pooler", None) is not None:
            self.model.pooler = None  # its weights would never have a gradient
        self.model.requires_grad_(trained)
        self.trained = trained
        self.feature_dim = int(self.model.config.hidden_size)
        self._length = min(length, int(self._tokenizer.model_max_length))
        self._name, self._hash = name, ""
        self.register_load_state_dict_post_hook(_forget_hash)  # type: ignore[no-untyped-call]
        self.train(self.training)

    def train(self, mode: bool = True) -> "PretrainedText":
        """Set the mode; a model that does not learn stays in evaluation mode."""
        super().train(mode)
        self.model.train(mode and self.trained)
        return self

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return the features (B, D) of texts, on the module's device."""
        if not texts:
            return torch.zeros(0, self.feature_dim, device=self.model.device)
        if self.trained or self.model.device.type != "cpu":
            with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
                return self._read(texts)
        self._hash = self._hash or hash_weights(self.model)
        kept = _READ.setdefault((self._name, self._length, self._hash), {})
        rows = []
        with torch.no_grad():
            for text in texts:
                if text not in kept:
                    kept[text] = self._read([text])[0]
                rows.append(kept[text])
        for text in list(kept)[: max(0, len(kept) - _MOST_KEPT)]:
            del kept[text]
        return torch.stack(rows)

    def _read(self, texts: Sequence[str]) -> Tensor:
        tokens = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self._length, return_tensors="pt"
        ).to(self.model.device)
        states: Tensor = self.model(**tokens).last_hidden_state  # [B, L, D]
        mask = tokens["attention_mask"][..., None].to(states)
        mean: Tensor = (states * mask).sum(dim=1) / mask.sum(dim=1)
        return mean


def _forget_hash(module: nn.Module, _: object) -> None:
    module._hash = ""  # type: ignore[assignment]
