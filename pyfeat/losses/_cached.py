"""A training step over a batch whose activations do not fit: gradients of features are cached."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from pyfeat._checks import dtype_name
from pyfeat._extras import require

OP = "cached_step"

# Of features encoded twice, relative to their norm. Other kernels with and without gradients round
# differently, in bfloat16 by about 0.01; a dropout of 0.1 that is drawn anew moves them by 0.4.
_SLACK = 0.05

Encoder = Callable[..., Tensor]


@overload
def cached_step(
    encoders: Encoder | Sequence[Encoder],
    inputs: Any,
    loss: Callable[..., Tensor],
    *,
    chunk_size: int | Sequence[int],
    backward: bool = True,
    scaler: torch.amp.GradScaler | None = None,
    progress: bool = False,
) -> Tensor: ...
@overload
def cached_step(
    encoders: Encoder | Sequence[Encoder],
    inputs: Any,
    loss: Callable[..., tuple[Any, ...]],
    *,
    chunk_size: int | Sequence[int],
    backward: bool = True,
    scaler: torch.amp.GradScaler | None = None,
    progress: bool = False,
) -> tuple[Any, ...]: ...
def cached_step(
    encoders: Encoder | Sequence[Encoder],
    inputs: Any,
    loss: Callable[..., Any],
    *,
    chunk_size: int | Sequence[int],
    backward: bool = True,
    scaler: torch.amp.GradScaler | None = None,
    progress: bool = False,
) -> Any:
    """Loss and gradients of a whole batch, with the activations of one chunk at a time.

    Encodes all chunks without gradients, takes the loss of all features and its gradients by them, and
    encodes chunk by chunk again to pass these gradients on: in place of ``loss(encoder(x)).backward()``
    it adds the same to every ``.grad``, those of the loss's own parameters included. It equals a plain
    step that encodes the same chunks with gradients and concatenates their features:

    - a chunk is encoded again with the random states of torch (CPU and CUDA) and the autocast state that
      it was encoded with, so that dropout is the same; the random states then go on as after one pass;
    - buffers of the encoders, such as running statistics, are set back before the second pass and
      end as after one pass. In training mode a batch normalisation takes the statistics of a chunk.

    Modules with a ``no_sync`` method, such as ``DistributedDataParallel``, reduce their gradients once,
    with the last chunk. Encoders without anything to learn are not encoded again.

    Args:
        encoders: A module or other callable, or a list or tuple of them, of which one may come more
            than once. A callable is called with a chunk and returns a tensor of floats (n, ...).
            Buffers and ``no_sync`` are those of a module or of the module that a method belongs to.
        inputs: Of the one encoder, or a list or tuple with those of each. A tensor or list of samples is
            cut along its first axis; a tuple becomes positional arguments and a mapping keyword
            arguments, of which tensors with axes and lists are cut and others are passed as they are.
            Tensors that require gradients must be leaves.
        loss: Called with the features of each encoder, (N, ...); returns the loss, a tensor (), or a
            tuple that begins with it.
        chunk_size: Rows at a time, at least 1; or of each encoder.
        backward: False only takes the loss, without gradients, as for validation.
        scaler: Scales the loss before its gradients are taken; the loss is returned unscaled.
        progress: Show a progress bar over the chunks (needs tqdm).

    Returns:
        The loss, detached; or the tuple, with the loss detached and the rest as it is.

    Raises:
        TypeError: If an encoder or the loss returns no tensor of floats, or a chunk size is no integer.
        ValueError: If inputs and encoders do not match, inputs have different numbers of rows, or a
            chunk size is below 1.
        RuntimeError: If an encoder returns other features the second time, for example because it
            draws from another random generator; gradients of earlier chunks are in place then.
        ImportError: If a progress bar is wanted and tqdm is not installed.

    Memory: activations of one chunk, and all features with their gradients. Buffers are copied once.
    Time: one forward pass more than a plain step.
    Source: Gao et al., Scaling deep contrastive learning batch size under memory limited setup, RepL4NLP
    2021, arXiv:2101.06983.

    Examples:
        >>> encoder = torch.nn.Linear(2, 2)
        >>> loss = lambda z1, z2: (z1 - z2).square().mean()
        >>> views = [torch.ones(5, 2), torch.ones(5, 2)]
        >>> cached_step([encoder, encoder], views, loss, chunk_size=2)
        tensor(0.)
        >>> encoder.weight.grad
        tensor([[0., 0.],
                [0., 0.]])
    """
    towers = _towers(encoders, inputs, chunk_size)
    learning = [each for each in towers if backward and each.learns]
    with _progress_bar(progress, sum(len(each.chunks) for each in towers + learning)) as advance:
        devices = _cuda_devices(towers)
        buffers = {each.key: _Buffers(each.module) for each in learning}
        with torch.no_grad():
            for tower in towers:
                tower.encode(devices, advance)
        # Some versions of torch go on to use weights that autocast has cast without gradients.
        torch.clear_autocast_cache()
        with torch.set_grad_enabled(backward):
            result = loss(*(each.features.requires_grad_(backward) for each in towers))
            value = _checked_loss(result)
            if backward:
                with _without_autocast():
                    torch.autograd.backward(value if scaler is None else scaler.scale(value))
                afterwards = _RandomState(devices)
                try:
                    _encode_again(learning, buffers, advance)
                finally:
                    afterwards.restore()
    value = value.detach()
    return (value, *result[1:]) if isinstance(result, tuple) else value


class _Tower:
    """One encoder with its batch, cut into chunks."""

    features: Tensor  # (N, ...)

    def __init__(self, encoder: Encoder, batch: Any, chunk_size: int) -> None:
        owners = (encoder, getattr(encoder, "__self__", None))
        self.module = next((each for each in owners if isinstance(each, nn.Module)), None)
        self.key = id(encoder if self.module is None else self.module)
        self._encoder: Callable[..., object] = encoder
        self._batch = batch
        arguments = self._arguments(slice(None))
        self.tensors = [each for each in arguments if isinstance(each, Tensor)]
        counts = {len(each) for each in arguments if _has_rows(each)}
        if len(counts) != 1:
            found = " and ".join(map(str, sorted(counts))) or "none that can be cut"
            message = f"{OP}: inputs must have one number of rows for an encoder, got {found}"
            raise ValueError(message)
        # An empty batch is one chunk: every process of a group has gradients to reduce.
        firsts = range(0, max(counts.pop(), 1), chunk_size)
        self.chunks = [slice(first, first + chunk_size) for first in firsts]
        known = (each.requires_grad for each in (*self.tensors, *self.parameters()))
        self.learns = self.module is None or any(known)
        self._states: list[_RandomState] = []
        self._rows: list[slice] = []  # of features, by chunk

    def parameters(self) -> list[Tensor]:
        return [] if self.module is None else list(self.module.parameters())

    def encode(self, devices: Collection[int], advance: Callable[[], object]) -> None:
        """All chunks, without gradients."""
        parts, first = [], 0
        for chunk in self.chunks:
            self._states.append(_RandomState(devices))
            parts.append(self._call(chunk))
            self._rows.append(slice(first, first := first + len(parts[-1])))
            advance()
        self.features = torch.cat(parts)

    def encode_again(self, index: int) -> None:
        """A chunk, with gradients, which those of its features are passed on to."""
        self._states[index].restore()
        rows, gradient = self._rows[index], self.features.grad
        with torch.set_grad_enabled(gradient is not None):
            features = self._call(self.chunks[index])
        _check_same(features.detach(), self.features.detach()[rows])
        if gradient is not None and features.requires_grad:
            with _without_autocast():
                torch.autograd.backward(features, gradient[rows])

    def without_reduction(self) -> AbstractContextManager[None]:
        """Of gradients between processes."""
        no_sync = getattr(self.module, "no_sync", nullcontext)
        return cast("AbstractContextManager[None]", no_sync())

    def _call(self, chunk: slice) -> Tensor:
        arguments = self._arguments(chunk)
        if isinstance(self._batch, Mapping):
            features = self._encoder(**dict(zip(self._batch, arguments, strict=True)))
        else:
            features = self._encoder(*arguments)
        if (
            not isinstance(features, Tensor)
            or not features.is_floating_point()
            or not features.ndim
        ):
            message = (
                f"{OP}: encoders must return a tensor of floats (n, ...), got {_kind(features)}"
            )
            raise TypeError(message)
        return features

    def _arguments(self, chunk: slice) -> list[Any]:
        """Of the encoder for a chunk."""
        batch = self._batch
        if isinstance(batch, Mapping):
            whole = list(batch.values())
        else:
            whole = list(batch) if isinstance(batch, tuple) else [batch]
        return [each[chunk] if _has_rows(each) else each for each in whole]


class _RandomState:
    """Of torch's generators, as they are."""

    def __init__(self, devices: Collection[int]) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in devices}

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)


class _Buffers:
    """Of a module, as they are; held by their places, as a module may put in new tensors."""

    def __init__(self, module: nn.Module | None) -> None:
        modules = () if module is None else module.modules()
        self._held = [
            (owner, name, buffer, buffer.clone())
            for owner in modules
            for name, buffer in owner.named_buffers(recurse=False)
        ]

    def restore(self) -> None:
        for owner, name, buffer, value in self._held:
            with torch.no_grad():
                buffer.copy_(value)
            if getattr(owner, name) is not buffer:
                setattr(owner, name, buffer)


def _towers(encoders: Any, inputs: Any, chunk_size: Any) -> list[_Tower]:
    several = isinstance(encoders, list | tuple | nn.ModuleList)
    encoders, inputs = (list(encoders), inputs) if several else ([encoders], [inputs])
    if not isinstance(inputs, list | tuple) or len(inputs) != len(encoders):
        got = len(inputs) if isinstance(inputs, list | tuple) else type(inputs).__name__
        message = f"{OP}: inputs must be {len(encoders)}, one for each encoder, got {got}"
        raise ValueError(message)
    single = not isinstance(chunk_size, Sequence)
    sizes = [chunk_size] * len(encoders) if single else list(chunk_size)
    if len(sizes) != len(encoders):
        message = f"{OP}: chunk_size must be one number or {len(encoders)}, got {len(sizes)}"
        raise ValueError(message)
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int):
            message = f"{OP}: chunk_size must be an integer, got {size!r}"
            raise TypeError(message)
        if size < 1:
            message = f"{OP}: chunk_size must be at least 1, got {size}"
            raise ValueError(message)
    return [_Tower(*each) for each in zip(encoders, inputs, sizes, strict=True)]


def _encode_again(
    towers: Sequence[_Tower], buffers: Mapping[int, _Buffers], advance: Callable[[], object]
) -> None:
    """All chunks of the encoders that have something to learn, in their order."""
    keys = {each.key for each in towers if each.features.grad is not None}
    jobs = [(each, i) for each in towers if each.key in keys for i in range(len(each.chunks))]
    last = {each.key: job for job, (each, _) in enumerate(jobs) if each.features.grad is not None}
    for key in keys:
        buffers[key].restore()
    for job, (tower, index) in enumerate(jobs):
        with nullcontext() if last[tower.key] == job else tower.without_reduction():
            tower.encode_again(index)
        advance()


def _cuda_devices(towers: Sequence[_Tower]) -> set[int]:
    """On which an encoder may draw random numbers."""
    tensors = (each for tower in towers for each in (*tower.tensors, *tower.parameters()))
    devices = {each.get_device() for each in tensors if each.is_cuda}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        devices.add(torch.cuda.current_device())
    return devices


@contextmanager
def _progress_bar(shown: bool, total: int) -> Iterator[Callable[[], object]]:
    """What to call after every chunk."""
    if not shown:
        yield lambda: None
        return
    tqdm = require("tqdm", extra="anomaly", op=OP)
    with tqdm.tqdm(total=total, desc=OP, unit="chunk") as bar:
        yield bar.update


@contextmanager
def _without_autocast() -> Iterator[None]:
    """As for a backward pass after the context that its forward pass ran in."""
    active = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    with ExitStack() as stack:
        for kind in active:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _has_rows(value: object) -> bool:
    return isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 0)


def _checked_loss(result: object) -> Tensor:
    value = result[0] if isinstance(result, tuple) and result else result
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() != 1:
        message = f"{OP}: loss must return a tensor of floats (), got {_kind(value)}"
        raise TypeError(message)
    return value


def _check_same(features: Tensor, before: Tensor) -> None:
    if features.shape != before.shape:
        got = f"shape {tuple(features.shape)} after {tuple(before.shape)}"
    else:
        norm = float(torch.linalg.vector_norm(before.float()))
        change = float(torch.linalg.vector_norm((features - before).float()))
        if not change > _SLACK * norm:  # NaN is for the loss to judge
            return
        got = f"a change of norm {change:.3g} to features of norm {norm:.3g}"
    message = f"{OP}: encoders must return the same features for a chunk twice, got {got}"
    raise RuntimeError(message)


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)} of {tuple(value.shape)}"
    return type(value).__name__
