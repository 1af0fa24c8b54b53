"""Losses of a student that predicts the prototypes of a teacher."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyfeat import reference
from pyfeat._backends import Backend
from pyfeat._checks import check_features, distance_dtype_of
from pyfeat._contrast_blocks import without_autocast
from pyfeat.losses._arguments import check_shape, checked_features, positive_number
from pyfeat.losses._group import Reduce, meeting, outside_graphs, sum_over
from pyfeat.losses._prototypes import checked_batch, prediction_losses
from pyfeat.losses._reduction import (
    Losses,
    Reduction,
    check_group,
    check_reduction,
    is_reference,
    reduced_mean,
)
from pyfeat.losses._sinkhorn import (
    assignment_scale,
    balanced_columns,
    check_iterations,
    softmax_assignment,
)


@outside_graphs
def dino_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    *,
    student_temperature: float | Tensor = 0.1,
    teacher_temperature: float = 0.04,
    center: Tensor | None = None,
    sinkhorn_iterations: int | None = None,
    normalize: bool = False,
    reduction: Reduction = "mean",
    group: "dist.ProcessGroup | None" = None,
    reduce: Reduce = "ddp_mean",
    backend: Backend | None = None,
) -> Tensor:
    """Cross-entropy of a student's prototypes with those of a teacher that sees other views.

    ``loss_i = mean over teacher views t and student views v != t of -sum_k p_t,ik ln
    softmax_k(student_v,i . student_prototypes_k / student_temperature)`` with p_t the softmax over
    prototypes of ``(teacher_t @ teacher_prototypes.T - center) / teacher_temperature``, or
    Sinkhorn-Knopp's assignments of all teacher views together. Features are what enters the last
    linear layer of a head, and prototypes its weight: the layer is part of the loss. No gradient
    flows through the teacher.

    Args:
        student: V views (B, D), float32, float64, float16 or bfloat16, finite. B may be 0.
        teacher: T views (B, C), of the dtype of the student's; teacher view t shows what student
            view t does, and these two are not compared.
        student_prototypes: (K, D), dtype and device of the views, K >= 1.
        teacher_prototypes: (K, C).
        student_temperature: > 0; a tensor () may have a gradient.
        teacher_temperature: > 0, with the limit of ``epsilon`` in ``sinkhorn_assignment``.
        center: (K,) float, such as that of a ``DINOCenter``; None: 0.
        sinkhorn_iterations: >= 1 balances the prototypes in place of a centre; None: softmax.
        normalize: Divide all vectors by their length, prototypes too (a last layer with weight
            norm); zero vectors stay zero.
        reduction: "none" returns the losses (B,).
        group: Processes whose batches, of any sizes, the loss is over, and which Sinkhorn-Knopp
            assigns together; None: this process alone.
        reduce: As in ``swav_loss``.
        backend: Backend to run; None takes the fastest that supports the inputs.

    Returns:
        () float32, float64 for float64 features, or (B,) with reduction "none".

    Raises:
        TypeError: If features are not float, or iterations no integer.
        ValueError: If shapes disagree, a value is out of range, or a feature is NaN or infinite; on
            several processes also if arguments differ.
        RuntimeError: If another process has raised.
        NotImplementedError: If no backend, or not the one asked for, supports the inputs.

    Precision: as ``swav_loss``.
    Memory: O((V B + K) D + (T B + K) C), and as much of the student's scores as
    ``set_memory_budget`` lets the backward pass keep; the teacher's are never stored.
    Source: Caron et al., Emerging properties in self-supervised vision transformers, ICCV 2021,
    arXiv:2104.14294; Sinkhorn-Knopp: Oquab et al., DINOv2, 2023, arXiv:2304.07193.

    Examples:
        >>> view = torch.eye(2)
        >>> dino_loss([view, view], [view], torch.eye(2), torch.eye(2), teacher_temperature=1.0)
        tensor(2.6895)
    """
    op = "dino_loss"
    options = _Options(
        student_temperature,
        teacher_temperature,
        center,
        sinkhorn_iterations,
        normalize,
        reduction,
        group,
        reduce,
        backend,
    )
    return _distilled(
        op,
        [(f"student[{i}]", view) for i, view in enumerate(student)],
        [(f"teacher[{i}]", view) for i, view in enumerate(teacher)],
        (student_prototypes, teacher_prototypes),
        range(len(teacher)),
        options,
    )


@outside_graphs
def ibot_loss(
    student: Tensor,
    teacher: Tensor,
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    *,
    weights: Tensor | None = None,
    student_temperature: float | Tensor = 0.1,
    teacher_temperature: float = 0.04,
    center: Tensor | None = None,
    sinkhorn_iterations: int | None = None,
    normalize: bool = False,
    reduction: Reduction = "mean",
    group: "dist.ProcessGroup | None" = None,
    reduce: Reduce = "ddp_mean",
    backend: Backend | None = None,
) -> Tensor:
    """Cross-entropy of a student's prototypes for masked patches with those of its teacher.

    ``dino_loss`` between the same rows: ``loss_i = -sum_k p_ik ln softmax_k(student_i .
    student_prototypes_k / student_temperature)``.

    Args:
        student: (B, D), the B masked patches of all images.
        teacher: (B, C), the same patches.
        student_prototypes: (K, D); all arguments that are not named here are as in ``dino_loss``,
            also what is raised.
        teacher_prototypes: (K, C).
        weights: (B,) float, finite, >= 0, such as 1 / (masked patches of the image); None: 1. No
            gradient.
        student_temperature: See above.
        teacher_temperature: See above.
        center: See above.
        sinkhorn_iterations: See above.
        normalize: See above.
        reduction: "mean" divides by the sum of weights; "sum" adds up, and "none" returns, weighted
            losses.
        group: See above.
        reduce: See above.
        backend: See above.

    Returns:
        () float32, float64 for float64 features, or (B,) with reduction "none".

    Memory: as ``dino_loss``.
    Source: Zhou et al., iBOT: image BERT pre-training with online tokenizer, ICLR 2022,
    arXiv:2111.07832.

    Examples:
        >>> patches = torch.eye(2)
        >>> ibot_loss(patches, patches, torch.eye(2), torch.eye(2), teacher_temperature=1.0)
        tensor(2.6895)
    """
    op = "ibot_loss"
    options = _Options(
        student_temperature,
        teacher_temperature,
        center,
        sinkhorn_iterations,
        normalize,
        reduction,
        group,
        reduce,
        backend,
    )
    prototypes = student_prototypes, teacher_prototypes
    return _distilled(
        op,
        [("student", student)],
        [("teacher", teacher)],
        prototypes,
        [None],
        options,
        weights=weights,
    )


class DINOCenter(nn.Module):
    """Running mean of a teacher's scores, which ``dino_loss`` subtracts from them.

    ``center`` (K,) float32 starts at 0 and is saved with the state.

    Args:
        num_prototypes: K >= 1.
        momentum: In [0, 1], the weight of what was before.

    Examples:
        >>> center = DINOCenter(2, momentum=0.5)
        >>> center.update([torch.eye(2)], torch.eye(2))
        >>> center.center
        tensor([0.2500, 0.2500])
    """

    center: Tensor

    def __init__(self, num_prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        if num_prototypes < 1:
            message = f"DINOCenter: num_prototypes must be at least 1, got {num_prototypes}"
            raise ValueError(message)
        if not 0.0 <= momentum <= 1.0:
            message = f"DINOCenter: momentum must be in [0, 1], got {momentum}"
            raise ValueError(message)
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(num_prototypes))

    @outside_graphs
    @torch.no_grad()
    def update(
        self,
        teacher: Sequence[Tensor],
        teacher_prototypes: Tensor,
        *,
        normalize: bool = False,
        group: "dist.ProcessGroup | None" = None,
    ) -> None:
        """Move the centre towards the mean score of a batch.

        That is ``mean(teacher) @ teacher_prototypes.T``. Without features nothing moves.

        Args:
            teacher: Views (B, C), of any B, as in ``dino_loss``.
            teacher_prototypes: (K, C).
            normalize: As in the loss.
            group: Processes over whose features the mean is taken; None: this one alone.

        Raises:
            TypeError: If features are not float.
            ValueError: If shapes disagree, or a feature is NaN or infinite.

        Memory: O(B C + K C); the (B, K) scores are never stored.
        """
        op = "DINOCenter.update"
        with meeting(op, group) as met:
            named = [(f"teacher[{i}]", view) for i, view in enumerate(teacher)]
            prototypes = ("teacher_prototypes", teacher_prototypes)
            *views, w = checked_features(op, *named, prototypes, normalize=normalize)
            check_shape(op, *prototypes, (len(self.center), w.shape[1]), self.center)
            met.tell(w, w, torch.ones(()), momentum=self.momentum)
        # The number of features at the end, so that one message brings both.
        total = torch.zeros(w.shape[1] + 1, dtype=torch.float64, device=w.device)
        for view in views:
            total[:-1] += view.sum(dim=0, dtype=torch.float64)
            total[-1] += len(view)
        total = sum_over(total, met.ranks)
        count = total[-1]
        mean = (total[:-1] / count.clamp_min(1.0)).to(self.center.dtype)
        with without_autocast(w):
            scores = w.to(mean.dtype) @ mean  # [K]
        self.center.lerp_(scores, (1.0 - self.momentum) * float(count > 0))

    def extra_repr(self) -> str:
        """As in ``DINOCenter(65536, momentum=0.9)``."""
        return f"{len(self.center)}, momentum={self.momentum}"


class _Options(NamedTuple):
    """Arguments that both losses have, as they were given."""

    student_temperature: float | Tensor
    teacher_temperature: float
    center: Tensor | None
    sinkhorn_iterations: int | None
    normalize: bool
    reduction: Reduction
    group: "dist.ProcessGroup | None"
    reduce: Reduce
    backend: Backend | None


def _distilled(
    op: str,
    student: Sequence[tuple[str, Tensor]],
    teacher: Sequence[tuple[str, Tensor]],
    prototypes: tuple[Tensor, Tensor],
    sources: Sequence[int | None],
    options: _Options,
    weights: Tensor | None = None,
) -> Tensor:
    """The loss of views, all of which are checked; a target of view i of a teacher has a source."""
    normalize, backend, iterations = options.normalize, options.backend, options.sinkhorn_iterations
    with meeting(op, options.group) as met:
        if not any(i != source for i in range(len(student)) for source in sources):
            message = (
                f"{op}: student and teacher must have views that can be compared with other views, "
                f"got {len(student)} and {len(teacher)}"
            )
            raise ValueError(message)
        check_reduction(op, options.reduction)
        named = ("student_prototypes", prototypes[0]), ("teacher_prototypes", prototypes[1])
        views, b = checked_batch(op, student, len(student), named[0], normalize)
        seen, w = checked_batch(op, teacher, len(teacher), named[1], normalize)
        check_features(op, teacher[0][0], seen[0], dtype=b.dtype)
        check_shape(op, teacher[0][0], seen[0], (len(views[0]), w.shape[1]), b)
        check_shape(op, "teacher_prototypes", w, (len(b), w.shape[1]), b)
        predicting = 1.0 / positive_number(
            op, "student_temperature", options.student_temperature, b
        )
        x, w = torch.cat(seen).detach(), w.detach()
        scale = assignment_scale(op, "teacher_temperature", options.teacher_temperature, x, w)
        center = _checked_center(op, options, float(scale), b)
        counts = None if weights is None else _checked_weights(op, weights, views[0])
        check_group(op, options.group, options.reduce, backend, b)
        by_definition = is_reference(op, backend, b)
        met.tell(
            views[0],
            b,
            predicting,
            teacher_temperature=1.0 / float(scale),
            sinkhorn_iterations=iterations,
            num_prototypes=len(b),
            num_views=(len(views), len(seen)),
            weighted=weights is not None,
            reduction=options.reduction,
            reduce=options.reduce,
        )
    if by_definition:
        distilled = reference.Teacher(x, w, 1.0 / scale, center, iterations)
        losses = reference.dino_losses(views, b, 1.0 / predicting, distilled, sources)
    else:
        if iterations is None:
            columns = (-scale * center).to(distance_dtype_of(b))
        else:
            columns = balanced_columns(op, x, w, scale, iterations, met.ranks, backend)
        assignment = softmax_assignment(op, x, w, scale, columns, backend)
        targets = assignment.mean(b).view(len(seen), *views[0].shape)
        losses = prediction_losses(op, views, b, predicting, list(targets), sources, backend)
    if counts is not None:
        losses = losses * counts
        if options.reduction == "mean":
            total = sum_over(counts.sum(), met.ranks)
            num_rows = len(counts) if met.ranks is None else sum(met.ranks.num_rows)
            losses = losses * (num_rows / total.where(total > 0, 1.0))
    return reduced_mean(op, [Losses(losses)], options.reduction, b, met.ranks, options.reduce)


def _checked_weights(op: str, weights: Tensor, features: Tensor) -> Tensor:
    """(B,) float64."""
    check_shape(op, "weights", weights, (len(features),), features)
    weights = weights.detach().double()
    if not bool(((weights >= 0) & weights.isfinite()).all()):
        message = (
            f"{op}: weights must be finite and at least 0, "
            f"got {float(weights.min())} to {float(weights.max())}"
        )
        raise ValueError(message)
    return weights


def _checked_center(op: str, options: _Options, scale: float, prototypes: Tensor) -> Tensor:
    """(K,) float64, which float32 holds over the temperature."""
    center, iterations = options.center, options.sinkhorn_iterations
    if iterations is not None:
        check_iterations(op, iterations, name="sinkhorn_iterations")
    if center is None:
        return prototypes.new_zeros(len(prototypes), dtype=torch.float64)
    if iterations is not None:
        message = f"{op}: center must be None with sinkhorn_iterations, got a tensor"
        raise ValueError(message)
    check_shape(op, "center", center, (len(prototypes),), prototypes)
    center = center.detach().double()
    largest = float(center.abs().max())
    if not largest * scale <= 1e30:
        message = (
            f"{op}: center must be finite and at most 1e30 teacher_temperature, got {largest:.3g}"
        )
        raise ValueError(message)
    return center
