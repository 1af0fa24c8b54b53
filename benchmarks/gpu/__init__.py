"""Benchmarks on an NVIDIA GPU, ours against everybody's that is installed.

``python -m benchmarks.gpu`` measures and prints one table; ``benchmarks/gpu.sh`` builds, tests and checks
before. ``races.py`` lists what is measured, ``search.py``, ``losses.py`` and ``attention.py`` say how;
``turns.py`` lets contenders take turns on ``clock.py``, and ``report.py`` writes the table.
"""
