"""Images and their labels: read alike by quantize, evaluate, predict, serve and the checks."""

from van_deploy.data.images import (
    Batch,
    ImageItem,
    ImageSet,
    decoded_batches,
    find_images,
    image_set,
    open_image,
    opened,
)
from van_deploy.data.images import Batch as CheckImages
from van_deploy.data.labels import class_names_from_file, label_sets, labelled_images
from van_deploy.data.samples import check_images, digits_set, noise_set, sample_set

__all__ = [
    "Batch",
    "CheckImages",
    "ImageItem",
    "ImageSet",
    "check_images",
    "class_names_from_file",
    "decoded_batches",
    "digits_set",
    "find_images",
    "image_set",
    "label_sets",
    "labelled_images",
    "noise_set",
    "open_image",
    "opened",
    "sample_set",
]
