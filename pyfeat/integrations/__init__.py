"""Deformable attention of this library inside others; each of them an optional dependency."""
