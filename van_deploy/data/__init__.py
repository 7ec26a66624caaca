"""Images and their labels: read alike by quantize, evaluate, predict, serve and the checks."""

from van_deploy.data.calibration import choose, digits_set, noise_set, refuse_overlap, split
from van_deploy.data.decode import (
    IMAGE_MODES,
    Batch,
    decoded_batches,
    open_image,
    opened,
    read_pixels,
    require_images_of,
)
from van_deploy.data.items import (
    IMAGE_SUFFIXES,
    ImageItem,
    ImageSet,
    dataset_digest,
    find_images,
    image_set,
)
from van_deploy.data.labels import (
    CLASS_ORDERS,
    class_names_from_file,
    labelled_images,
    with_labels_if_known,
)
from van_deploy.data.samples import CheckImages, check_images, sample_set

__all__ = [
    "CLASS_ORDERS",
    "IMAGE_MODES",
    "IMAGE_SUFFIXES",
    "Batch",
    "CheckImages",
    "ImageItem",
    "ImageSet",
    "check_images",
    "choose",
    "class_names_from_file",
    "dataset_digest",
    "decoded_batches",
    "digits_set",
    "find_images",
    "image_set",
    "labelled_images",
    "noise_set",
    "open_image",
    "opened",
    "read_pixels",
    "refuse_overlap",
    "require_images_of",
    "sample_set",
    "split",
    "with_labels_if_known",
]
