"""Small networks that train on a CPU in minutes; each enters itself in ``NETWORKS``."""
