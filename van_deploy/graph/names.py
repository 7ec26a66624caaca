"""What a graph's input and output are called."""

__all__ = ["INPUT_NAME", "OUTPUT_NAME"]

INPUT_NAME = "images"
OUTPUT_NAME = "logits"
