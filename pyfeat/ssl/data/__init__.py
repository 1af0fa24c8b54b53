"""Sources of samples, one a file; each enters itself in ``SOURCES``."""
