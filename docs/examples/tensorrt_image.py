"""Name the five most probable classes of an image with TensorRT alone; needs a GPU."""

import tensorrt as trt
import torch  # for memory on the GPU; any other library does as well

runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
with open("engine.plan", "rb") as file:
    engine = runtime.deserialize_cuda_engine(file.read())  # None: another GPU or version
context, stream = engine.create_execution_context(), torch.cuda.Stream()
pixels = torch.zeros((1, 224, 224, 3), dtype=torch.uint8, device="cuda")  # resized and cropped
logits = torch.empty((1, 1000), dtype=torch.float32, device="cuda")
context.set_input_shape("pixels", tuple(pixels.shape))
context.set_tensor_address("pixels", pixels.data_ptr())
context.set_tensor_address("logits", logits.data_ptr())
torch.cuda.synchronize()  # pixels are ready
context.execute_async_v3(stream.cuda_stream)
stream.synchronize()
print(logits[0].topk(5).indices.tolist())
