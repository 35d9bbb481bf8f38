// Reading and writing safetensors, and every rule of the strict reader.
#include "core/safetensors.h"

#include <cstring>

#include "core/error.h"
#include "core/files.h"
#include "core/safetensors_parts.h"
#include "tests/support/check.h"

using namespace longhand;
using namespace longhand::test;

namespace {

std::string file_of(const std::string& header, const std::string& data, int64_t length = -1) {
  const uint64_t n = length < 0 ? header.size() : static_cast<uint64_t>(length);
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &n, 8);
  return bytes + header + data;
}

// The message with which `bytes` is refused; empty when it is read.
std::string refusal(const std::string& bytes) {
  const ScratchFolder scratch;
  const std::string path = scratch.file("x.safetensors");
  write_file_atomically(path, bytes);
  try {
    read_safetensors(path);
  } catch (const FileError& error) {
    const std::string text = error.what();
    CHECK(text.find(path) != std::string::npos);  // always names the file
    return text;
  }
  return "";
}

bool refused_for(const std::string& bytes, const std::string& reason) {
  return refusal(bytes).find(reason) != std::string::npos;
}

}  // namespace

TEST("a file that several write is the file that one writes, byte for byte") {
  const ScratchFolder scratch;
  const Device cpu = Device::cpu();
  std::vector<float> numbers;
  for (int i = 0; i < 35; ++i) numbers.push_back(static_cast<float>(i) / 7);
  const Tensor a = Tensor::from(cpu, {5, 7}, numbers), b = a.reshape({35}).slice(0, 3, 14).to(Dtype::f64);
  const std::map<std::string, std::string> metadata{{"format", "pt"}};
  write_safetensors(scratch.file("one"), {{"a", a}, {"b", b}, {"empty", Tensor::empty(cpu, Dtype::f32, {0, 3})}}, metadata);
  auto run = [](const Tensor& t, int64_t begin, int64_t end) {
    return TensorParts::Run{begin, t.reshape({t.numel()}).slice(0, begin, end)};
  };
  auto described = [&](std::vector<TensorParts::Run> of_a, std::vector<TensorParts::Run> of_b) {
    return std::map<std::string, TensorParts>{{"a", {a.dtype(), a.shape(), std::move(of_a)}},
                                              {"b", {b.dtype(), b.shape(), std::move(of_b)}},
                                              {"empty", {Dtype::f32, {0, 3}, {}}}};
  };
  const auto first = described({run(a, 0, 10), run(a, 30, 35)}, {}), second = described({run(a, 10, 30)}, {run(b, 0, 11)});
  make_safetensors(scratch.file("two"), first, metadata);
  write_safetensors_part(scratch.file("two"), second, metadata);
  CHECK(read_text_file(scratch.file("two")) != read_text_file(scratch.file("one")));
  write_safetensors_part(scratch.file("two"), first, metadata);
  CHECK(read_text_file(scratch.file("two")) == read_text_file(scratch.file("one")));
  CHECK_THROWS_AS(write_safetensors_part(scratch.file("absent"), first, metadata), FileError);
  write_file_atomically(scratch.file("short"), "x");
  CHECK_THROWS_WITH_AS(write_safetensors_part(scratch.file("short"), first, metadata), doctest::Contains("another size"), FileError);
  CHECK_THROWS_AS(write_safetensors_part(scratch.file("two"), described({run(a, 0, 35), {30, a.reshape({35})}}, {}), metadata), ShapeError);
}

TEST("tensors of every type survive writing and reading") {
  const ScratchFolder scratch;
  const Device cpu = Device::cpu();
  const Tensor a = Tensor::from(cpu, {2, 3}, std::vector<float>{1, 2, 3, 4, 5, 6});
  const std::map<std::string, Tensor> written{{"a", a},
                                              {"half", a.to(Dtype::bf16)},
                                              {"sixteen", a.to(Dtype::f16)},
                                              {"wide", a.to(Dtype::f64)},
                                              {"ids", Tensor::from(cpu, {3}, std::vector<int32_t>{7, -8, 9})},
                                              {"scalar", Tensor::full(cpu, Dtype::f32, {}, 4)},
                                              {"nothing", Tensor::empty(cpu, Dtype::f32, {0, 5})},
                                              {"view", a.slice(-1, 1, 3)}};
  write_safetensors(scratch.file("t.safetensors"), written, {{"format", "pt"}});
  const NamedTensors read = read_safetensors(scratch.file("t.safetensors"));
  CHECK(read.metadata.at("format") == "pt");
  CHECK(read.tensors.size() == written.size());
  for (const auto& [name, tensor] : written) {
    CHECK(read.at(name).shape() == tensor.shape());
    CHECK(read.at(name).dtype() == tensor.dtype());
    CHECK(read.at(name).to_vector<double>() == tensor.to_vector<double>());
  }
  CHECK_THROWS_AS(read.at("absent"), FileError);
  uint64_t header = 0;
  std::memcpy(&header, read_text_file(scratch.file("t.safetensors")).data(), 8);
  CHECK((8 + header) % 64 == 0);
}

TEST("each broken rule is refused by name") {
  const std::string one = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
  const std::string data(8, '\0');
  CHECK(refusal(file_of(one, data)).empty());
  CHECK(refused_for("123", "shorter than the 8 bytes"));
  CHECK(refused_for(file_of(one, data, 100'000'001), "over the limit"));
  CHECK(refused_for(file_of(one, data, 1000), "longer than the file"));
  CHECK(refused_for(file_of("{\"a\":", ""), "not valid JSON"));
  CHECK(refused_for(file_of("[1]", ""), "not a JSON object"));
  CHECK(refused_for(file_of("{} x", ""), "not valid JSON"));
  CHECK(refused_for(file_of(one + std::string("\0x", 2), data), "a NUL byte"));
  CHECK(refused_for(file_of("\xEF\xBB\xBF" + one, data), "does not begin with {"));
  CHECK(refusal(file_of(" \n" + one + "  ", data)).empty());  // white space around it is fine
  CHECK(refused_for(file_of(R"({"a":[[[[[[[[[1]]]]]]]]]})", ""), "nested"));
  CHECK(refused_for(file_of(one, data + "x"), "bytes after the last tensor"));
  CHECK(refused_for(file_of(one, "1234"), "outside the file"));
  CHECK(refused_for(file_of(R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})", data), "do not fit dtype and shape"));
  CHECK(refused_for(file_of(R"({"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}})", data), "not a non-negative integer"));
  CHECK(refused_for(file_of(R"({"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}})", data), "not a non-negative integer"));
  CHECK(refused_for(file_of(R"({"a":{"dtype":"F8_E4M3","shape":[8],"data_offsets":[0,8]}})", data), "F8_E4M3"));
  CHECK(refused_for(file_of(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1}})", data),
                    "exactly dtype, shape and data_offsets"));
  CHECK(refused_for(file_of(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", data), "a gap"));
  CHECK(refused_for(
      file_of(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", data),
      "overlap"));
  CHECK(refused_for(
      file_of(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", data),
      "stands twice"));
  CHECK(refused_for(file_of(R"({"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}})", data), "stands twice"));
  CHECK(refused_for(file_of(R"({"__metadata__":{"k":1}})", ""), "not a string"));
  CHECK(refused_for(file_of(R"({"a\u0000b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", data), "control character"));
  CHECK(refused_for(file_of(R"({"a":{"dtype":"F32","shape":[281474976710656,281474976710656],"data_offsets":[0,8]}})", data), "over 2^48"));
  for (const char* shape : {"[0,140737488355328,140737488355328]", "[140737488355328,140737488355328,0]"})  // its strides overflow
    CHECK(refused_for(file_of(std::string(R"({"a":{"dtype":"F32","shape":)") + shape + R"(,"data_offsets":[0,0]}})", ""), "over 2^48"));
}

TEST("a safetensors file cut off anywhere, or with more behind it, is refused") {
  const ScratchFolder scratch;
  const Tensor a = Tensor::from(Device::cpu(), {2}, std::vector<float>{1, 2});
  write_safetensors(scratch.file("a"), {{"a", a}, {"b", a.to(Dtype::f16)}}, {{"format", "pt"}});
  const std::string whole = read_text_file(scratch.file("a"));
  REQUIRE(refusal(whole).empty());
  for (std::size_t size = 0; size < whole.size(); ++size) CHECK_MESSAGE(!refusal(whole.substr(0, size)).empty(), size);
  CHECK(refused_for(whole + "x", "bytes after the last tensor"));
}

TEST("names that no tensor can have, offsets and files of other kinds are refused by name") {
  const std::string data(8, '\0');
  const auto named = [&](const std::string& name) {
    return file_of("{\"" + name + "\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", data);
  };
  CHECK(refused_for(named(""), "a tensor name is empty"));
  CHECK(refused_for(named(std::string(5000, 'a')), "too long"));
  CHECK(refused_for(named("a\\n"), "control character"));
  CHECK(refused_for(named("\xff"), "not valid JSON"));
  const auto entry = [&](const std::string& text) { return file_of("{\"a\":{" + text + "}}", data); };
  CHECK(refused_for(entry(R"("dtype":"F32","shape":[2])"), "exactly dtype"));
  CHECK(refused_for(entry(R"("dtype":"F32","shape":2,"data_offsets":[0,8])"), "shape a list"));
  CHECK(refused_for(entry(R"("dtype":"F32","shape":[2],"data_offsets":[0,8,8])"), "list of two"));
  CHECK(refused_for(entry(R"("dtype":"F32","shape":[2],"data_offsets":[8,0])"), "outside the file"));
  CHECK(refused_for(entry(R"("dtype":"F32","shape":[2e0],"data_offsets":[0,8])"), "not a non-negative integer"));
  CHECK(refused_for(entry(R"("dtype":"F32","shape":[-0],"data_offsets":[0,8])"), "not a non-negative integer"));
  CHECK(refused_for(entry(R"("dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,8])"), "not a non-negative integer"));
  CHECK(refused_for(entry(R"("dtype":"F32","shape":[1,1,1,1,1,1,2],"data_offsets":[0,8])"), "more axes"));
  CHECK(refused_for("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"));
  const ScratchFolder scratch;
  const Tensor a = Tensor::zeros(Device::cpu(), Dtype::f32, {1});
  for (const std::string& name : {std::string("__metadata__"), std::string(), std::string("a\nb"), std::string("\xff")})
    CHECK_THROWS_AS(write_safetensors(scratch.file("x"), {{name, a}}), FileError);
}
