"""Where images come from: the user's folder, or sample pictures when there is none."""

from van_deploy.images.batches import ImageTransform, UnreadableImages, load_batches
from van_deploy.images.dead_leaves import dead_leaves_picture
from van_deploy.images.files import (
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    file_digest,
    find_images,
    open_image,
)
from van_deploy.images.samples import Samples, sample_batch, sample_pictures

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "ImageTransform",
    "Samples",
    "UnreadableImages",
    "dead_leaves_picture",
    "file_digest",
    "find_images",
    "load_batches",
    "open_image",
    "sample_batch",
    "sample_pictures",
]
