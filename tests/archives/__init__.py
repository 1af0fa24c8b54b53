"""What a release is built and checked with."""
