"""Name the five most probable classes of photo.jpg with ONNX Runtime, NumPy and Pillow alone."""

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

SIZE, SHORT_SIDE = 224, 248  # preprocessing.image_size, and that over crop_pct

image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
width, height = (SHORT_SIDE * side // min(image.size) for side in image.size)
image = image.resize((width, height), Image.Resampling.BICUBIC)
left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
pixels = np.asarray(image.crop((left, top, left + SIZE, top + SIZE)))[None]

session = onnxruntime.InferenceSession("model.uint8.onnx", providers=["CPUExecutionProvider"])
(logits,) = session.run(["logits"], {"pixels": pixels})
print(np.argsort(-logits[0])[:5])
