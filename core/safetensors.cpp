// See safetensors.h.
#include "core/safetensors.h"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>

#include "core/error.h"
#include "core/files.h"

namespace longhand {
namespace {

using Json = nlohmann::json;
constexpr std::size_t kLargestHeader = 100'000'000;
constexpr std::size_t kLongestName = 4096;
constexpr std::size_t kMostTensors = 1'000'000;
constexpr int kDeepestNesting = 8;
constexpr uint64_t kLargestInteger = uint64_t{1} << 48;

struct DtypeName {
  const char* name;
  Dtype dtype;
};
constexpr DtypeName kDtypes[] = {{"F64", Dtype::f64}, {"F32", Dtype::f32}, {"F16", Dtype::f16}, {"BF16", Dtype::bf16}, {"I64", Dtype::i64},
                                 {"I32", Dtype::i32}, {"U16", Dtype::u16}, {"U8", Dtype::u8},   {"BOOL", Dtype::u8}};

const char* file_name_of(Dtype dtype) {
  for (const auto& row : kDtypes)
    if (row.dtype == dtype) return row.name;
  return "U8";
}

class Reader {
 public:
  explicit Reader(const std::string& path) : file_(path) {}

  NamedTensors read() {
    const auto bytes = file_.bytes();
    if (bytes.size() < 8) refuse("shorter than the 8 bytes of the header's length");
    uint64_t header_bytes = 0;
    std::memcpy(&header_bytes, bytes.data(), 8);
    if (header_bytes > kLargestHeader)
      refuse("the header's length is over the limit of 100,000,000 bytes", {{"length", std::to_string(header_bytes)}});
    if (header_bytes > bytes.size() - 8)
      refuse("the header is longer than the file",
             {{"length", std::to_string(header_bytes)}, {"file bytes", std::to_string(bytes.size())}});
    const char* text = reinterpret_cast<const char*>(bytes.data()) + 8;
    const Json header = parse(text, text + header_bytes);
    data_ = bytes.data() + 8 + header_bytes;
    data_bytes_ = bytes.size() - 8 - header_bytes;

    NamedTensors result;
    result.path = file_.path();
    std::vector<std::pair<uint64_t, uint64_t>> spans;
    for (const auto& [name, entry] : header.items()) {
      if (name == "__metadata__") {
        if (!entry.is_object()) refuse("__metadata__ is not an object");
        for (const auto& [key, value] : entry.items()) {
          if (!value.is_string()) refuse("a value of __metadata__ is not a string", {{"key", key}});
          result.metadata[key] = value.get<std::string>();
        }
        continue;
      }
      result.tensors[name] = tensor(name, entry, spans);
    }
    std::sort(spans.begin(), spans.end());
    uint64_t at = 0;
    for (const auto& [begin, end] : spans) {
      if (begin != at)
        refuse(begin > at ? "a gap between tensors" : "tensors that overlap",
               {{"data byte", std::to_string(at)}, {"next begins at", std::to_string(begin)}});
      at = end;
    }
    if (at != data_bytes_)
      refuse("bytes after the last tensor", {{"tensors end at", std::to_string(at)}, {"data bytes", std::to_string(data_bytes_)}});
    return result;
  }

 private:
  [[noreturn]] void refuse(const std::string& rule, std::vector<ErrorRow> rows = {}) const {
    rows.insert(rows.begin(), {"file", file_.path()});
    throw FileError("safetensors: " + rule, std::move(rows));
  }

  // Strict JSON: one object, no key twice on a level (nlohmann keeps the last silently, so keys are watched while parsing).
  Json parse(const char* begin, const char* end) const {
    // Two things that nlohmann lets pass: a NUL ends its input early, and a byte order mark is skipped.
    if (std::find(begin, end, '\0') != end) refuse("a NUL byte in the header");
    const char* first = std::find_if(begin, end, [](char c) { return c != ' ' && c != '\t' && c != '\n' && c != '\r'; });
    if (first == end || (*first != '{' && *first != '[')) refuse("the header does not begin with {");
    std::vector<std::set<std::string>> keys;
    std::string duplicate;
    bool deep = false;
    const auto watch = [&](int depth, Json::parse_event_t event, Json& parsed) {
      if (event == Json::parse_event_t::object_start) keys.emplace_back();
      if (event == Json::parse_event_t::object_end) keys.pop_back();
      if (event == Json::parse_event_t::key && !keys.back().insert(parsed.get<std::string>()).second) duplicate = parsed.get<std::string>();
      deep = deep || depth > kDeepestNesting;
      return true;
    };
    Json header;
    try {
      header = Json::parse(begin, end, watch);
    } catch (const Json::exception& problem) {
      refuse("the header is not valid JSON", {{"reason", problem.what()}});
    }
    if (deep) refuse("the header is nested deeper than 8 levels");
    if (!duplicate.empty()) refuse("a key of the header stands twice", {{"key", duplicate}});
    if (!header.is_object()) refuse("the header is not a JSON object");
    if (header.size() > kMostTensors) refuse("more tensors than the limit of 1,000,000");
    return header;
  }

  uint64_t whole_number(const std::string& name, const Json& value) const {
    if (!value.is_number_unsigned()) refuse("a size or offset is not a non-negative integer", {{"tensor", name}, {"value", value.dump()}});
    const auto n = value.get<uint64_t>();
    if (n > kLargestInteger) refuse("a size or offset is over 2^48", {{"tensor", name}, {"value", value.dump()}});
    return n;
  }

  Tensor tensor(const std::string& name, const Json& entry, std::vector<std::pair<uint64_t, uint64_t>>& spans) const {
    if (name.size() > kLongestName) refuse("a tensor name is too long", {{"bytes", std::to_string(name.size())}});
    if (std::any_of(name.begin(), name.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; }))
      refuse("a control character in a tensor name", {{"tensor", Json(name).dump()}});
    if (!entry.is_object() || entry.size() != 3 || !entry.contains("dtype") || !entry.contains("shape") || !entry.contains("data_offsets"))
      refuse("a tensor needs exactly dtype, shape and data_offsets", {{"tensor", name}});
    const Json &dtype_name = entry["dtype"], &sizes = entry["shape"], &offsets = entry["data_offsets"];
    if (!dtype_name.is_string() || !sizes.is_array() || !offsets.is_array() || offsets.size() != 2)
      refuse("dtype must be a string, shape a list, data_offsets a list of two", {{"tensor", name}});
    const DtypeName* known = nullptr;
    for (const auto& row : kDtypes)
      if (dtype_name.get<std::string>() == row.name) known = &row;
    if (known == nullptr)
      refuse("an element type that longhand does not read", {{"tensor", name}, {"dtype", dtype_name.get<std::string>()}});
    if (sizes.size() > static_cast<std::size_t>(Shape::kMaxRank))
      refuse("more axes than a tensor can have", {{"tensor", name}, {"shape", sizes.dump()}});

    Shape shape;
    uint64_t elements = 1;
    for (const Json& size : sizes) {
      const uint64_t n = whole_number(name, size);
      if (n != 0 && elements > kLargestInteger / n) refuse("the shape's product is over 2^48", {{"tensor", name}, {"shape", sizes.dump()}});
      elements *= n;
      shape.push_back(static_cast<int64_t>(n));
    }
    const uint64_t begin = whole_number(name, offsets[0]), end = whole_number(name, offsets[1]);
    const uint64_t expected = elements * static_cast<uint64_t>(size_of(known->dtype));
    if (end < begin || end > data_bytes_)
      refuse("data_offsets outside the file",
             {{"tensor", name}, {"data_offsets", offsets.dump()}, {"data bytes", std::to_string(data_bytes_)}});
    if (end - begin != expected)
      refuse("data_offsets do not fit dtype and shape",
             {{"tensor", name}, {"bytes", std::to_string(end - begin)}, {"expected", std::to_string(expected)}});
    spans.emplace_back(begin, end);

    const std::byte* address = data_ + begin;
    const auto alignment = static_cast<std::uintptr_t>(size_of(known->dtype));
    if (reinterpret_cast<std::uintptr_t>(address) % alignment == 0)
      return Tensor::borrow(known->dtype, shape, address, std::make_shared<MappedFile>(file_));
    const Tensor copied = Tensor::empty(Device::cpu(), known->dtype, shape);
    if (expected > 0) std::memcpy(copied.raw(), address, expected);
    return copied;
  }

  MappedFile file_;
  const std::byte* data_ = nullptr;
  uint64_t data_bytes_ = 0;
};

}  // namespace

const Tensor& NamedTensors::at(const std::string& name) const {
  const auto found = tensors.find(name);
  if (found == tensors.end()) throw FileError("safetensors: a tensor is missing", {{"file", path}, {"tensor", name}});
  return found->second;
}

NamedTensors read_safetensors(const std::string& path) {
  return Reader(path).read();
}

void write_safetensors(const std::string& path, const std::map<std::string, Tensor>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  std::vector<std::pair<std::string, Tensor>> order(tensors.begin(), tensors.end());
  std::stable_sort(order.begin(), order.end(),
                   [](const auto& a, const auto& b) { return size_of(a.second.dtype()) > size_of(b.second.dtype()); });
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  int64_t at = 0;
  for (const auto& [name, tensor] : order) {
    const int64_t bytes = tensor.numel() * size_of(tensor.dtype());
    header[name] = {{"dtype", file_name_of(tensor.dtype())},
                    {"shape", std::vector<int64_t>(tensor.shape().begin(), tensor.shape().end())},
                    {"data_offsets", {at, at + bytes}}};
    at += bytes;
  }
  std::string text = header.dump();
  while ((8 + text.size()) % 64 != 0) text += ' ';
  write_file_atomically(path, [&](OutputFile& out) {
    const uint64_t length = text.size();
    out.write(&length, 8);
    out.write(text);
    for (const auto& [name, tensor] : order) {
      const Tensor host = tensor.to(Device::cpu()).contiguous();
      out.write(host.raw(), static_cast<std::size_t>(host.numel() * size_of(host.dtype())));
    }
  });
}

}  // namespace longhand
