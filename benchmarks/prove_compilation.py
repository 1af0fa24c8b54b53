"""The long proof of the compiler: the Triton kernels of all launches, for every architecture.

``python -m benchmarks.prove_compilation`` takes about three minutes on two cores; the launches that
cover each branch of each kernel are in the test suite, with the same demands.
"""

import os
import subprocess
import sys
from pathlib import Path

from tests.test_triton_compile import EVERY_LAUNCH


def main() -> int:
    """Run the tests of the compiler over all launches; 0 if they pass."""
    command = [sys.executable, "-m", "pytest", "tests/test_triton_compile.py"]
    root = Path(__file__).resolve().parents[1]
    return subprocess.run(
        command, cwd=root, env={**os.environ, EVERY_LAUNCH: "1"}, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
