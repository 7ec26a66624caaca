"""The network, its variants, and everything about getting weights into it.

``van`` is the network, and random weights for it; ``variants`` what is known without any
weights; ``checkpoint.load_van`` the way from what a user asked for to a loaded network:
``files`` finds and reads a weights file, ``keys`` its tensors' names, ``metadata`` and
``processors`` what stands beside them; ``preprocess`` is the contract that travels with the
weights; ``registry`` makes the variants known to timm.
"""
