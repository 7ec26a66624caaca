"""Images and their labels: read alike by quantize, evaluate, predict, serve and the checks."""

from van_deploy.data.decode import Batch, decoded_batches, open_image, opened
from van_deploy.data.items import ImageItem, ImageSet, dataset_digest, find_images, image_set
from van_deploy.data.labels import CLASS_ORDERS, label_sets, labelled_images
from van_deploy.data.samples import (
    CheckImages,
    check_images,
    digits_set,
    noise_set,
    sample_set,
)
from van_deploy.data.words import class_names_from_file

__all__ = [
    "CLASS_ORDERS",
    "Batch",
    "CheckImages",
    "ImageItem",
    "ImageSet",
    "check_images",
    "class_names_from_file",
    "dataset_digest",
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
