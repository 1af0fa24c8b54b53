"""The end of a process group that a test has made."""

import time

import torch.distributed as dist


def leave_group() -> None:
    """Destroy the process group of this process, once its threads hold nothing of the interpreter.

    A thread of gloo lets go of a collective's Python objects a moment after the collective is over, and
    takes the interpreter's lock for it. A process that ends meanwhile aborts, and one that waits for the
    thread under the lock hangs.
    """
    time.sleep(0.2)
    dist.destroy_process_group()
