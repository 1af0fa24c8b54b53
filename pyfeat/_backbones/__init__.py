"""The routes of ``load_backbone``, one module per kind of network."""
