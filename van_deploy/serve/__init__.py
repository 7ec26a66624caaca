"""Inference with a bundle: prediction, packages for Triton, a small HTTP server."""
