"""What a graph's inputs and outputs are called."""

INPUT_NAME = "images"
OUTPUT_NAME = "logits"  # of a classifier; a backbone's are stage1 to stage4


def module_of(tensor: str) -> str:
    """Return the path of the module whose result a tensor is: its name, but for the outputs.

    >>> module_of("logits"), module_of("stage2"), module_of("block1.0.mlp")
    ('head', 'norm2', 'block1.0.mlp')
    """
    if tensor == OUTPUT_NAME:
        return "head"
    return tensor.replace("stage", "norm") if tensor[:-1] == "stage" else tensor
