"""The tests; before any of them imports torch, how its threads wait."""

import os

# Threads that wait actively take the processors from other processes that test.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
