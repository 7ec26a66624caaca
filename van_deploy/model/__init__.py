"""The network, its variants, and everything about getting weights into it.

``van`` is the network and nothing else; ``variants`` what is known without any
weights; ``checkpoint.load_van`` the way from what a user asked for to a loaded
network; ``preprocess`` the contract that travels with the weights; ``registry``
makes the variants known to timm.
"""
