"""Run the benchmarks, then write ``RESULTS.md`` and ``plots/``.

``make bench``, or ``python -m benchmarks [--only FAMILY]``. A family is a file ``bench_<family>.py``.
Nothing is written unless every benchmark ends, and the other families keep their results.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.plots import write_plots
from benchmarks.records import Results
from benchmarks.report import family_reports, merge_reports

FOLDER = Path(__file__).resolve().parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    families = sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", action="append", choices=families, help="run this family")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, needs --out")
    parser.add_argument("--out", type=Path, help="folder of RESULTS.md and plots (benchmarks)")
    parser.add_argument("--json", type=Path, help="keep the measurements of all rounds here")
    options = parser.parse_args(arguments)
    if options.quick and options.out is None:
        parser.error("--quick needs --out: its times must not replace the results")

    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder) / "measured.json"
        status = _run(options.only or families, measured, quick=options.quick)
        if options.json and measured.exists():
            shutil.copyfile(measured, options.json)
        if status:
            print("not complete: the results are left as they are", file=sys.stderr)
            return status
        out = options.out or FOLDER
        write_results(Results.read(measured), out)
        print(f"wrote {out / 'RESULTS.md'}")
    return 0


def write_results(results: Results, out: Path) -> None:
    """Write the report and the plots of the families in ``results`` into the folder ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        drawn = write_plots(results.records, Path(folder) / "plots")
        reports = family_reports(results, {name: f"plots/{file}" for name, file in drawn.items()})
        report, plots = out / "RESULTS.md", out / "plots"
        old = report.read_text(encoding="utf-8") if report.exists() else ""
        aside = Path(folder) / "RESULTS.md"
        aside.write_text(merge_reports(old, reports), encoding="utf-8")
        plots.mkdir(exist_ok=True)
        for family in reports:
            for stale in plots.glob(f"{family}_*.png"):
                stale.unlink()
        for file in drawn.values():
            (Path(folder) / "plots" / file).replace(plots / file)
        aside.replace(report)


def _run(families: Sequence[str], measured: Path, *, quick: bool) -> int:
    """Run pytest in a process of its own, which shows the progress; its exit status."""
    files = [str(FOLDER / f"bench_{family}.py") for family in families]
    command = [sys.executable, "-m", "pytest", *files, "--capture=no", "--quiet"]
    # A peer's warning of things to come ends no benchmark.
    command += ["-W", "default"]
    command += ["-p", "no:cacheprovider", "--benchmark-quiet", f"--benchmark-json={measured}"]
    if quick:
        command.append("--quick")
    try:
        return subprocess.run(command, cwd=FOLDER.parent, check=False).returncode
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
