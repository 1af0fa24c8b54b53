"""Every op of an installed pyfeat, once: ``python -I smoke.py``.

It needs pyfeat with its two dependencies and nothing else. ``--cuda`` says that the installation
must carry the CUDA module: without a GPU it then has to say why the backend is off, with one the
ops run there too.
"""

import argparse
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import pyfeat
from pyfeat import losses, reference

# Of one value of a loss or of one sample: float32 with room for the order of sums.
TOLERANCE = 1e-5


def close(name: str, got: Tensor, expected: Tensor) -> None:
    """Raise unless the two agree, relative to the largest expected."""
    error = (got.detach().double().cpu() - expected.detach().double().cpu()).abs().max()
    scale = expected.detach().double().abs().max().clamp(min=1)
    if not error <= TOLERANCE * scale:
        message = f"{name}: must be {expected.flatten()[:4]}, got {got.flatten()[:4]}"
        raise AssertionError(message)


def search(device: str) -> None:
    queries, memory = torch.randn(37, 19, device=device), torch.randn(501, 19, device=device)
    for metric in ("euclidean", "sqeuclidean", "cosine", "inner_product"):
        found = pyfeat.knn(queries, memory, 5, metric=metric)
        distances, indices = reference.knn(queries.cpu(), memory.cpu(), 5, metric)
        if not torch.equal(found.indices.cpu(), indices):
            message = f"knn: {metric} found other rows than float64"
            raise AssertionError(message)
        close(f"knn {metric}", found.distances, distances)
    near = pyfeat.range_search(queries.cpu(), memory.cpu(), radius=5.0)
    within = torch.cdist(queries.cpu().double(), memory.cpu().double()) <= 5.0
    close("range_search", near.offsets.diff(), within.sum(dim=1))
    nearest = reference.knn(queries.cpu(), memory.cpu(), 1, "euclidean")[0]
    close("bank_min_distance", pyfeat.bank_min_distance(queries, memory), nearest.mean())
    rows = pyfeat.knn(queries.cpu().numpy(), memory.cpu().numpy()).indices
    if not isinstance(rows, np.ndarray):
        message = f"knn: NumPy in must give NumPy out, got {type(rows)}"
        raise TypeError(message)


def bank(device: str) -> None:
    memory = torch.randn(300, 16, device=device)
    bank = pyfeat.MemoryBank(memory)
    bank.add(memory[:3] + 100)
    bank.remove(torch.tensor([7]))
    close("MemoryBank", bank.search(memory[8:9]).distances, torch.zeros(1, 1))
    coreset = pyfeat.greedy_coreset(memory.cpu(), size=30)
    reached = torch.cdist(memory.cpu(), memory.cpu()[coreset.indices]).amin(dim=1).max()
    close("greedy_coreset", torch.tensor(float(coreset.radius)), reached)
    if find_spec("safetensors"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "bank.safetensors"
            bank.save(path)
            close("MemoryBank.load", pyfeat.MemoryBank.load(path).features, bank.features)


def matches(device: str) -> None:
    a = torch.randn(60, 24, device=device)
    order = torch.randperm(60, device=device)
    for method in ("mutual", "ratio", "dual_softmax"):
        pairs = pyfeat.match(a, a[order], method=method)
        close(f"match {method}", order[pairs.indices_b], pairs.indices_a)
        if len(pairs.indices_a) < 50:
            message = f"match: {method} must find the copies, got {len(pairs.indices_a)} of 60"
            raise AssertionError(message)


def contrast(device: str) -> None:
    rows = F.normalize(torch.randn(2, 48, 32, device=device), dim=2)
    image, text = (x.clone().requires_grad_() for x in rows)
    expected_image, expected_text = (x.double().requires_grad_() for x in rows)
    logits = 10.0 * expected_image @ expected_text.T
    target = torch.arange(48, device=device)
    signs = 2 * torch.eye(48, dtype=torch.float64, device=device) - 1
    one_sided = F.cross_entropy(logits, target)
    both_sides = (one_sided + F.cross_entropy(logits.T, target)) / 2
    pairs: dict[str, tuple[Tensor, Tensor]] = {
        "info_nce": (losses.info_nce(image, text, temperature=0.1), one_sided),
        "clip_loss": (losses.clip_loss(image, text, 10.0), both_sides),
        "siglip_loss": (
            losses.siglip_loss(image, text, 10.0, -5.0),
            -F.logsigmoid(signs * (logits - 5.0)).sum() / 48,
        ),
    }
    for name, (loss, expected) in pairs.items():
        close(name, loss, expected)
        got = torch.autograd.grad(loss, (image, text))
        wanted = torch.autograd.grad(expected, (expected_image, expected_text), retain_graph=True)
        for gradient, expected_gradient in zip(got, wanted, strict=True):
            close(f"{name}, gradient", gradient, expected_gradient)


def supervised(device: str) -> None:
    views = F.normalize(torch.randn(64, 16, device=device), dim=1)
    logits = views.double() @ views.double().T / 0.5
    logits.fill_diagonal_(-torch.inf)
    partner = torch.arange(64, device=device).roll(32)
    expected = F.cross_entropy(logits, partner)
    close("nt_xent", losses.nt_xent(views[:32], views[32:], temperature=0.5), expected)
    labels = torch.arange(64, device=device) % 32
    close("supcon_loss", losses.supcon_loss(views, labels, temperature=0.5), expected)
    nearest = torch.cdist(views.double(), views.double()).fill_diagonal_(torch.inf).amin(dim=1)
    close("koleo", losses.koleo(views), -nearest.log().mean())


def prototypes(device: str) -> None:
    features = F.normalize(torch.randn(2, 40, 16, device=device), dim=2)
    centres = F.normalize(torch.randn(12, 16, device=device), dim=1).requires_grad_()
    scores = features[0] @ centres.detach().T
    assigned = losses.sinkhorn(scores)
    close("sinkhorn", assigned.sum(dim=1), torch.ones(40))
    mean = losses.sinkhorn_assignment(features[0], centres.detach()).mean(centres.detach())
    close("sinkhorn_assignment", mean, assigned @ centres.detach())
    results = {
        "swav_loss": losses.swav_loss(list(features), centres),
        "dino_loss": losses.dino_loss(list(features), list(features), centres, centres.detach()),
        "ibot_loss": losses.ibot_loss(features[0], features[1], centres, centres.detach()),
    }
    for name, loss in results.items():
        (gradient,) = torch.autograd.grad(loss, centres)
        if not (loss > 0 and gradient.isfinite().all() and gradient.abs().sum() > 0):
            message = f"{name}: must be positive with a gradient, got {loss} and {gradient}"
            raise AssertionError(message)


def attention(device: str) -> None:
    levels: dict[int, list[tuple[int, ...]]] = {
        1: [(9,), (4,)],
        2: [(5, 7), (2, 3)],
        3: [(3, 4, 2), (2, 1, 3)],
    }
    for n, shapes in levels.items():
        cells = sum(int(np.prod(shape)) for shape in shapes)
        inputs = (
            torch.randn(2, cells, 2, 8, device=device),
            torch.rand(2, 11, 2, 2, 3, n, device=device),
            torch.rand(2, 11, 2, 2, 3, device=device),
        )
        leaves = [x.clone().requires_grad_() for x in inputs]
        expected_leaves = [x.double().cpu().requires_grad_() for x in inputs]
        output = pyfeat.deform_attn(leaves[0], shapes, *leaves[1:])
        expected = reference.deform_attn(expected_leaves[0], shapes, *expected_leaves[1:])
        close(f"deform_attn {n}-D", output, expected)
        weights = torch.randn_like(output)
        got = torch.autograd.grad(output, leaves, weights)
        wanted = torch.autograd.grad(expected, expected_leaves, weights.double().cpu())
        for gradient, expected_gradient in zip(got, wanted, strict=True):
            close(f"deform_attn {n}-D, gradient", gradient, expected_gradient)
    module = pyfeat.MultiScaleDeformAttn(16, num_heads=2, num_levels=2, num_points=2)
    queries, points = torch.randn(1, 5, 16), torch.rand(1, 5, 2, 2)
    if module(queries, points, torch.randn(1, 41, 16), levels[2]).shape != (1, 5, 16):
        message = "MultiScaleDeformAttn: must keep the shape of its queries"
        raise AssertionError(message)


OPS: tuple[Callable[[str], None], ...] = (
    *(search, bank, matches),
    *(contrast, supervised, prototypes, attention),
)


def backends(*, cuda: bool) -> list[str]:
    """Devices to run on, after a look at what ``pyfeat.info()`` says of this installation."""
    facts = pyfeat.info()
    report = facts["backends"]
    print(f"pyfeat {pyfeat.__version__} of {Path(pyfeat.__file__).parent}, torch {facts['torch']}")
    print(f"instruction sets {facts['instruction_sets']}, backends {report}")
    if not isinstance(report, dict) or report["cpu"] != "available":
        message = f"info: the CPU kernels must be available, got {report}"
        raise AssertionError(message)
    if not cuda:
        return ["cpu"]
    if find_spec("pyfeat._cuda") is None:
        message = "info: this installation must carry the module pyfeat._cuda"
        raise AssertionError(message)
    on = report["cuda"] == "available"
    fits = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    if on != fits or not (on or report["cuda"].startswith("missing: ")):
        message = f"info: must say why the CUDA kernels are off, got {report['cuda']!r}"
        raise AssertionError(message)
    return ["cpu", "cuda"] if on else ["cpu"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Run every op of the installed pyfeat once.")
    parser.add_argument("--cuda", action="store_true", help="the CUDA module must be there")
    devices = backends(cuda=parser.parse_args().cuda)
    torch.manual_seed(0)
    for device in devices:
        for op in OPS:
            op(device)
            print(f"{op.__name__} on {device}: as it should be")


if __name__ == "__main__":
    main()
