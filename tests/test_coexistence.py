"""pyfeat beside the libraries it is used with."""

import subprocess
import sys

import pytest

# One call of each, large enough to wake its threads.
CALLS = {
    "faiss": "import faiss; i = faiss.IndexFlatL2(16); i.add(x); i.search(x, 2)",
    "sklearn": "from sklearn.neighbors import NearestNeighbors as N; N().fit(x).kneighbors(x[:99])",
    "torch": "import torch; torch.randn(300, 300) @ torch.randn(300, 300)",
    "pyfeat": "import pyfeat; assert (pyfeat.knn(x, x).indices[:, 0] == np.arange(len(x))).all()",
}
PREPARE = (
    "import numpy as np; x = np.random.default_rng(0).standard_normal((3000, 16)).astype('f4')"
)


# Each at each place, before and after each other: runtimes meet in pairs, the first of which stays.
ORDERS = [
    (*names[i:], *names[:i])
    for names in (tuple(CALLS), tuple(CALLS)[::-1])
    for i in range(len(names))
]


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
def test_imports_in_any_order_work(order: tuple[str, ...]) -> None:
    # The second round calls each after all have started their threads.
    program = "\n".join([PREPARE, *(CALLS[name] for name in (*order, *order))])
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_the_import_takes_less_than_three_tenths_of_a_second_beyond_torch() -> None:
    # Of the processor, which other tests may keep from it meanwhile.
    program = (
        "import time, torch, numpy; t = time.process_time(); import pyfeat; "
        "print(time.process_time() - t)"
    )
    seconds = [
        float(
            subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout
        )
        for _ in range(3)
    ]
    assert min(seconds) < 0.3


def test_optional_packages_are_not_imported_with_pyfeat() -> None:
    program = (
        "import sys, torch; before = set(sys.modules); import pyfeat; heavy = {'PIL', 'matplotlib', 'sklearn', 'tqdm', 'transformers', "
        "'safetensors', 'typer', 'lightning', 'kornia', 'nibabel', 'yaml', 'torch._dynamo'}; found = heavy & "
        "(set(sys.modules) - before); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_forked_process_can_search() -> None:
    program = f"""{PREPARE}
import os, pyfeat
pyfeat.knn(x, x)
child = os.fork()
if child == 0:
    found = pyfeat.knn(x, x).indices[:, 0]
    os._exit(0 if (found == np.arange(len(x))).all() else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=60)


FORKED = "import pyfeat; assert (pyfeat.knn(x, x).indices[:, 0] == np.arange(len(x))).all()"
FORKS = {
    "before its first search": f"""
import pyfeat
child = os.fork()
if child == 0:
    {FORKED}
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
""",
    "before it is imported": f"""
child = os.fork()
if child == 0:
    {FORKED}
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
""",
    "by multiprocessing": f"""
import multiprocessing
def search():
    {FORKED}
child = multiprocessing.get_context("fork").Process(target=search)
child.start()
child.join()
assert child.exitcode == 0
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("fork", FORKS)
def test_a_process_forked_after_torch_has_used_its_threads_can_search(fork: str) -> None:
    # The runtime that torch has started would wait in the child for threads of the parent.
    wake = "import os, torch; torch.set_num_threads(2); torch.randn(1000, 1000).exp()"
    program = "\n".join([PREPARE, wake, FORKS[fork]])
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=60)


def test_searches_from_several_threads_at_once_agree() -> None:
    program = f"""{PREPARE}
import pyfeat
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool:
    for found in pool.map(lambda _: pyfeat.knn(x, x, 3).indices, range(24)):
        assert (found[:, 0] == np.arange(len(x))).all()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
