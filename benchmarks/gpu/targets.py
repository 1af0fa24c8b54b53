"""What the kernels are to reach on an H200, and whether they did."""

from collections.abc import Callable, Iterator, Mapping

from benchmarks.gpu.races import BACKWARD, CLIP, FORWARD, SEARCH
from benchmarks.gpu.turns import Outcome, Row
from benchmarks.records import Peak
from benchmarks.timing import GIGA, pair_ratios

_ENCODER = "13,294 queries"


def target_lines(outcomes: list[Outcome], peaks: Mapping[str, Peak]) -> Iterator[str]:
    """One for each target: met or missed, and the figures; or that it was not measured."""
    search = _find(outcomes, SEARCH, "12,544 × 65,536 × 1,536")
    clip = _find(outcomes, CLIP, "65,536 pairs × 768, bfloat16")
    forward = _find(outcomes, FORWARD, _ENCODER, "float32")
    backward = _find(outcomes, BACKWARD, _ENCODER, "float32")
    yield _line("knn, at least 4× mm + min in float32", search, _ratio_to("mm + topk", 4.0))
    yield _line("knn, at least 1× mm + min in TF32", search, _ratio_to("mm + topk, TF32", 1.0))
    yield _line("knn, at least 50% of the bf16 product rate", search, _share_of(peaks, 0.5))
    yield _line("CLIP, at most 60 ms", clip, lambda best, _: _at_most(best.seconds * 1e3, 60, "ms"))
    yield _line("CLIP, less than 2 GB beyond the inputs", clip, _memory_below(2e9))
    yield _line("attention, forward, at least 10×", forward, _ratio_to("transformers", 10.0))
    yield _line("attention, both ways, at least 8×", backward, _ratio_to("transformers", 8.0))
    for name, section, single in (
        ("forward", FORWARD, forward),
        ("both ways", BACKWARD, backward),
    ):
        half = _best(_find(outcomes, section, _ENCODER, "bfloat16"))
        yield _line(f"attention, {name}, bfloat16 faster than float32", single, _slower_than(half))


# Whether the best of ours meets a target, with the figure; None if there is no figure.
_Verdict = Callable[[Row, Outcome], "tuple[bool, str] | None"]


def _line(target: str, outcome: Outcome | None, verdict: _Verdict) -> str:
    best = _best(outcome)
    found = verdict(best, outcome) if best and outcome else None
    if best is None or found is None:
        return f"not measured: {target}"
    met, figure = found
    return f"{'met' if met else 'MISSED'}: {target}: {figure} ({best.name})"


def _find(outcomes: list[Outcome], section: str, *parts: str) -> Outcome | None:
    """The first race of a section whose case has all parts."""
    return next(
        (o for o in outcomes if o.section == section and all(part in o.case for part in parts)),
        None,
    )


def _best(outcome: Outcome | None) -> Row | None:
    """The fastest of ours."""
    ours = [row for row in outcome.rows if row.ours and row.cold] if outcome else []
    return min(ours, key=lambda row: row.seconds, default=None)


def _ratio_to(name: str, least: float) -> _Verdict:
    def verdict(best: Row, outcome: Outcome) -> tuple[bool, str] | None:
        peer = next((row for row in outcome.rows if row.name == name and row.cold), None)
        if peer is None:
            return None
        ratio = pair_ratios(best.cold, peer.cold).median
        return ratio >= least, f"{ratio:.2f}×"

    return verdict


def _share_of(peaks: Mapping[str, Peak], least: float) -> _Verdict:
    def verdict(best: Row, outcome: Outcome) -> tuple[bool, str] | None:
        if "bf16" not in peaks:
            return None
        share = best.amount / best.seconds / GIGA / peaks["bf16"].rate
        return share >= least, f"{share:.0%}"

    return verdict


def _memory_below(most: float) -> _Verdict:
    def verdict(best: Row, outcome: Outcome) -> tuple[bool, str] | None:
        if best.extra_mb is None:
            return None
        return best.extra_mb * 2**20 < most, f"{best.extra_mb:,.0f} MB"

    return verdict


def _slower_than(half: Row | None) -> _Verdict:
    def verdict(best: Row, outcome: Outcome) -> tuple[bool, str] | None:
        if half is None:
            return None
        ratio = best.seconds / half.seconds
        return ratio > 1.0, f"{ratio:.2f}×"

    return verdict


def _at_most(value: float, most: float, unit: str) -> tuple[bool, str]:
    return value <= most, f"{value:.1f} {unit}"
