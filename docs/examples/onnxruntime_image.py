"""Name the five most probable classes of photo.jpg with ONNX Runtime, NumPy and Pillow alone."""

import numpy as np
import onnxruntime
from PIL import Image

SIZE, SHORT_SIDE = 224, 248  # preprocessing.image_size, and that over crop_pct

image = Image.open("photo.jpg").convert("RGB")
scale = SHORT_SIDE / min(image.size)
width, height = (
    SHORT_SIDE if side == min(image.size) else int(side * scale) for side in image.size
)
image = image.resize((width, height), Image.Resampling.BICUBIC)
left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
pixels = np.asarray(image.crop((left, top, left + SIZE, top + SIZE)))[None]

session = onnxruntime.InferenceSession("model.uint8.onnx", providers=["CPUExecutionProvider"])
(logits,) = session.run(["logits"], {"pixels": pixels})
print(np.argsort(-logits[0])[:5])
