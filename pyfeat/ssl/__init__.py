"""Self-supervised training: unlabelled images, volumes and captions in, a backbone out."""
