"""The network, its variants, and loading of its weights.

``van`` has the network and random weights; ``variants`` the architectures;
``checkpoint.load_van`` loads a network: ``files`` locates and reads a weights file, ``keys``
converts its tensors' names, ``metadata`` and ``processors`` read its metadata; ``preprocess``
has the image preprocessing that belongs to the weights; ``registry`` registers the variants
with timm.
"""
