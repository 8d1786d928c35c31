"""Manifests from an HF config and a parallelism string: no weights, no frameworks."""
