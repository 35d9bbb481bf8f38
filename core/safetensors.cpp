// See safetensors.h.
#include "core/safetensors.h"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/plain_text.h"
#include "core/safetensors_parts.h"
#include "core/shared_output_file.h"
#include "core/strict_json.h"

namespace longhand {
namespace {

using Json = nlohmann::json;
constexpr std::size_t kLargestHeader = 100'000'000;
constexpr std::size_t kMostTensors = 1'000'000;
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
    if (is_git_lfs_pointer({reinterpret_cast<const char*>(bytes.data()), bytes.size()}))
      refuse("a Git LFS pointer instead of the file itself", {{"try", "git lfs pull in the folder of the repository"}});
    if (bytes.size() < 8) refuse("shorter than the 8 bytes of the header's length");
    uint64_t header_bytes = 0;
    std::memcpy(&header_bytes, bytes.data(), 8);
    if (header_bytes > kLargestHeader)
      refuse("the header's length is over the limit of 100,000,000 bytes", {{"length", std::to_string(header_bytes)}});
    if (header_bytes > bytes.size() - 8)
      refuse("the header is longer than the file",
             {{"length", std::to_string(header_bytes)}, {"file bytes", std::to_string(bytes.size())}});
    const char* text = reinterpret_cast<const char*>(bytes.data()) + 8;
    const Json header = parse_strict_json({text, header_bytes}, "safetensors: the header", file_.path());
    if (header.size() > kMostTensors) refuse("more tensors than the limit of 1,000,000");
    data_ = bytes.data() + 8 + header_bytes;
    data_bytes_ = bytes.size() - 8 - header_bytes;

    NamedTensors result;
    result.path = file_.path();
    result.files = {file_};
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

  uint64_t whole_number(const std::string& name, const Json& value) const {
    if (!value.is_number_unsigned()) refuse("a size or offset is not a non-negative integer", {{"tensor", name}, {"value", value.dump()}});
    const auto n = value.get<uint64_t>();
    if (n > kLargestInteger) refuse("a size or offset is over 2^48", {{"tensor", name}, {"value", value.dump()}});
    return n;
  }

  Tensor tensor(const std::string& name, const Json& entry, std::vector<std::pair<uint64_t, uint64_t>>& spans) const {
    if (!is_tensor_name(name)) refuse("a tensor name is empty, too long, or has a control character", {{"tensor", printable(name)}});
    if (!entry.is_object() || entry.size() != 3 || !entry.contains("dtype") || !entry.contains("shape") || !entry.contains("data_offsets"))
      refuse("a tensor needs exactly dtype, shape and data_offsets", {{"tensor", name}});
    const Json &dtype_name = entry["dtype"], &sizes = entry["shape"], &offsets = entry["data_offsets"];
    if (!dtype_name.is_string() || !sizes.is_array() || !offsets.is_array() || offsets.size() != 2)
      refuse("dtype must be a string, shape a list, data_offsets a list of two", {{"tensor", name}});
    const DtypeName* known = nullptr;
    for (const auto& row : kDtypes)
      if (dtype_name.get<std::string>() == row.name) known = &row;
    if (known == nullptr)
      refuse("an element type that longhand does not read", {{"tensor", name}, {"dtype", printable(dtype_name.get<std::string>())}});
    if (sizes.size() > static_cast<std::size_t>(Shape::kMaxRank))
      refuse("more axes than a tensor can have", {{"tensor", name}, {"shape", sizes.dump()}});

    Shape shape;
    uint64_t elements = 1;  // with axes of size 0 counted as 1: the strides of an empty tensor must fit too
    for (const Json& size : sizes) {
      const uint64_t n = whole_number(name, size);
      const uint64_t counted = std::max<uint64_t>(n, 1);
      if (elements > kLargestInteger / counted) refuse("the shape's product is over 2^48", {{"tensor", name}, {"shape", sizes.dump()}});
      elements *= counted;
      shape.push_back(static_cast<int64_t>(n));
    }
    const uint64_t begin = whole_number(name, offsets[0]), end = whole_number(name, offsets[1]);
    const uint64_t expected = static_cast<uint64_t>(shape.numel() * size_of(known->dtype));
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

NamedTensors read_safetensors(const std::string& path) {
  return Reader(path).read();
}

namespace {

// Where the tensors of a file lie: larger element types first, then by name.
struct Layout {
  struct Row {
    std::string name;
    int64_t begin, bytes;  // behind the header
  };
  std::string header;  // with its length in front, a multiple of 64 bytes
  std::vector<Row> rows;
  int64_t file_bytes = 0;
};

struct Described {
  Dtype dtype;
  Shape shape;
};

Layout layout_of(const std::string& path, const std::map<std::string, Described>& tensors,
                 const std::map<std::string, std::string>& metadata) {
  std::vector<std::pair<std::string, Described>> order;
  for (const auto& [name, described] : tensors) {
    if (!is_tensor_name(name) || !is_utf8(name) || name == "__metadata__")
      throw FileError("safetensors: no name for a tensor", {{"file", path}, {"tensor", printable(name)}});
    order.emplace_back(name, described);
  }
  std::stable_sort(order.begin(), order.end(),
                   [](const auto& a, const auto& b) { return size_of(a.second.dtype) > size_of(b.second.dtype); });
  Layout layout;
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  int64_t at = 0;
  for (const auto& [name, described] : order) {
    const auto& [dtype, shape] = described;
    const int64_t bytes = shape.numel() * size_of(dtype);
    header[name] = {
        {"dtype", file_name_of(dtype)}, {"shape", std::vector<int64_t>(shape.begin(), shape.end())}, {"data_offsets", {at, at + bytes}}};
    layout.rows.push_back({name, at, bytes});
    at += bytes;
  }
  std::string text = header.dump();
  while ((8 + text.size()) % 64 != 0) text += ' ';
  const uint64_t length = text.size();
  layout.header.assign(reinterpret_cast<const char*>(&length), 8);
  layout.header += text;
  layout.file_bytes = static_cast<int64_t>(layout.header.size()) + at;
  return layout;
}

}  // namespace

void write_safetensors(const std::string& path, const std::map<std::string, Tensor>& tensors,
                       const std::map<std::string, std::string>& metadata, const TensorFileOptions& options) {
  std::map<std::string, Described> described;
  for (const auto& [name, tensor] : tensors) described[name] = {stored_dtype(tensor, options), tensor.shape()};
  const Layout layout = layout_of(path, described, metadata);
  write_file_atomically(path, [&](OutputFile& out) {
    out.write(layout.header);
    for (const Layout::Row& row : layout.rows) {
      const Tensor& tensor = tensors.at(row.name);
      const Tensor stored = to_stored(row.name, tensor, options);
      out.write(stored.raw(), static_cast<std::size_t>(row.bytes));
      if (options.on_written) options.on_written(tensor);
    }
  });
}

namespace {

Layout layout_of_parts(const std::string& path, const std::map<std::string, TensorParts>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  std::map<std::string, Described> described;
  for (const auto& [name, parts] : tensors) described[name] = {parts.dtype, parts.shape};
  return layout_of(path, described, metadata);
}

}  // namespace

void make_safetensors(const std::string& path, const std::map<std::string, TensorParts>& tensors,
                      const std::map<std::string, std::string>& metadata) {
  const Layout layout = layout_of_parts(path, tensors, metadata);
  SharedOutputFile out(path, layout.file_bytes, true);
  out.write_at(0, layout.header.data(), layout.header.size());
  out.sync();
}

void write_safetensors_part(const std::string& path, const std::map<std::string, TensorParts>& tensors,
                            const std::map<std::string, std::string>& metadata) {
  const Layout layout = layout_of_parts(path, tensors, metadata);
  SharedOutputFile out(path, layout.file_bytes, false);
  for (const Layout::Row& row : layout.rows) {
    const TensorParts& parts = tensors.at(row.name);
    for (const TensorParts::Run& run : parts.runs) {
      if (run.values.dtype() != parts.dtype || run.begin < 0 || run.begin + run.values.numel() > parts.shape.numel())
        throw ShapeError(
            "safetensors: a part that does not lie in its tensor",
            {{"tensor", row.name + " " + parts.shape.str()}, {"part", run.values.describe() + " at " + std::to_string(run.begin)}});
      const Tensor host = run.values.to(Device::cpu()).contiguous();
      out.write_at(static_cast<int64_t>(layout.header.size()) + row.begin + run.begin * size_of(parts.dtype), host.raw(),
                   static_cast<std::size_t>(host.numel() * size_of(parts.dtype)));
    }
  }
  out.sync();
}

}  // namespace longhand
