"""Objectives of self-supervised training, one a file; each enters itself in ``OBJECTIVES``."""
