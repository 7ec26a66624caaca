// The logits of an image in the file RGB_FILE: g++ -std=c++17 onnxruntime_image.cpp -lonnxruntime
#include <onnxruntime_cxx_api.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 4) return std::fprintf(stderr, "usage: %s MODEL RGB_FILE SIZE\n", argv[0]), 2;
  const std::int64_t size = std::atoll(argv[3]);
  std::vector<std::uint8_t> pixels(size * size * 3);  // resized and cropped, R G B R G B ...
  std::FILE* file = std::fopen(argv[2], "rb");
  if (!file || std::fread(pixels.data(), 1, pixels.size(), file) != pixels.size()) return 1;
  std::fclose(file);

  Ort::Env env(ORT_LOGGING_LEVEL_WARNING);
  Ort::Session session(env, argv[1], Ort::SessionOptions());
  const std::array<std::int64_t, 4> shape{1, size, size, 3};
  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  Ort::Value input = Ort::Value::CreateTensor<std::uint8_t>(
      memory, pixels.data(), pixels.size(), shape.data(), shape.size());
  const char* inputs[] = {"pixels"};
  const char* outputs[] = {"logits"};
  auto answer = session.Run(Ort::RunOptions(), inputs, &input, 1, outputs, 1);
  const float* logits = answer[0].GetTensorData<float>();
  const auto classes = answer[0].GetTensorTypeAndShapeInfo().GetShape()[1];
  for (std::int64_t i = 0; i < classes; ++i) std::printf("%.6f\n", logits[i]);
}
