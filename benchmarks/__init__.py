"""Benchmarks: one harness, and a file ``bench_<family>.py`` for each family of operations.

A family is a module of benchmarks, functions ``test_*`` that take the fixture ``harness`` and call its
``race`` or ``values`` once. Its docstrings become headings and text of the report; ``PACKAGES`` names
the distributions whose versions the report states. The harness needs no change for a new family.
"""
