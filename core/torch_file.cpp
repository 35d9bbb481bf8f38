// See torch_file.h.
#include "core/torch_file.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <optional>

#include "core/error.h"
#include "core/pickle.h"
#include "core/plain_text.h"
#include "core/zip_archive.h"

namespace longhand {
namespace {

using Kind = PickleValue::Kind;
constexpr int64_t kNewestVersion = 10;  // of torch's container
constexpr uint64_t kSmallEntry = 64;    // bytes; entries of one word are shorter
constexpr char kLegacyMagic[] = "\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";
constexpr std::size_t kTarMagicAt = 257;
constexpr std::size_t kMostTensors = 1'000'000;

struct StorageClass {
  const char* name;
  std::optional<Dtype> dtype;  // absent: known, but not the type of a weight
};
constexpr StorageClass kStorageClasses[] = {{"FloatStorage", Dtype::f32},
                                            {"HalfStorage", Dtype::f16},
                                            {"BFloat16Storage", Dtype::bf16},
                                            {"DoubleStorage", Dtype::f64},
                                            {"LongStorage", {}},
                                            {"IntStorage", {}},
                                            {"ShortStorage", {}},
                                            {"CharStorage", {}},
                                            {"ByteStorage", {}},
                                            {"BoolStorage", {}}};

bool is_global(const PickleValue& value, std::string_view name) {
  return value.kind == Kind::global && pickle_globals()[static_cast<std::size_t>(value.integer)].name == name;
}

// A product or sum of sizes that is over the limit.
struct TooLarge {};
int64_t limited(bool overflow, int64_t value) {
  constexpr int64_t kLargest = int64_t{1} << 48;
  if (overflow || value > kLargest) throw TooLarge{};
  return value;
}
int64_t times(int64_t a, int64_t b) {
  int64_t result = 0;
  const bool overflow = __builtin_mul_overflow(a, b, &result);
  return limited(overflow, result);
}
int64_t plus(int64_t a, int64_t b) {
  int64_t result = 0;
  const bool overflow = __builtin_add_overflow(a, b, &result);
  return limited(overflow, result);
}

class Reader {
 public:
  Reader(const MappedFile& file, Checksums checksums) : file_(file), archive_(file), checksums_(checksums) {}

  NamedTensors read() {
    find_folder();
    require_format();
    const std::string index = folder_ + "/data.pkl";
    if (!archive_.entries().contains(index)) refuse("no data.pkl", {{"folder", folder_}});
    if (archive_.entries().contains(folder_ + "/constants.pkl"))
      refuse("a TorchScript program, not a state dict", {{"try", "torch.save(model.state_dict(), path)"}});
    if (checksums_ != Checksums::none) archive_.verify(index);
    const Pickle pickle = read_pickle(archive_.bytes(archive_.entries().at(index)), file_.path() + " (" + index + ")");
    NamedTensors result;
    result.path = file_.path();
    result.files = {file_};
    const PickleValue& dict = state_dict(pickle.root());
    if (dict.items.size() / 2 > kMostTensors) refuse("more tensors than the limit of 1,000,000");
    for (std::size_t i = 0; i < dict.items.size(); i += 2) {
      const PickleValue& key = *dict.items[i];
      name_.clear();
      if (key.kind != Kind::text || !is_tensor_name(key.text)) refuse("a key of the state dict is no name of a tensor", {}, &key);
      name_ = key.text;
      if (!result.tensors.emplace(name_, tensor(*dict.items[i + 1])).second) refuse("two tensors of one name", {}, &key);
    }
    return result;
  }

 private:
  [[noreturn]] void refuse(const std::string& rule, std::vector<ErrorRow> rows = {}, const PickleValue* value = nullptr) const {
    std::vector<ErrorRow> all{{"file", file_.path()}};
    if (!name_.empty()) all.push_back({"tensor", name_});
    if (value != nullptr) all.push_back({"byte", std::to_string(value->byte) + " of data.pkl"});
    all.insert(all.end(), rows.begin(), rows.end());
    throw FileError("torch file: " + rule, std::move(all));
  }

  // All entries stand in one folder, whose name the writer chose.
  void find_folder() {
    for (const auto& [name, entry] : archive_.entries()) {
      const auto slash = name.find('/');
      if (slash == std::string::npos) refuse("an entry outside any folder", {{"entry", name}});
      if (folder_.empty()) folder_ = name.substr(0, slash);
      if (name.substr(0, slash) != folder_) refuse("entries in two folders", {{"folders", folder_ + ", " + name.substr(0, slash)}});
    }
    if (folder_.empty()) refuse("an empty archive");
  }

  std::optional<std::string> word(const std::string& entry) const {  // the content of an entry of one word
    const auto found = archive_.entries().find(folder_ + "/" + entry);
    if (found == archive_.entries().end()) return std::nullopt;
    if (found->second.size > kSmallEntry) refuse("an entry that should be one word is too long", {{"entry", entry}});
    const auto data = archive_.bytes(found->second);
    std::string text(reinterpret_cast<const char*>(data.data()), data.size());
    while (!text.empty() && (text.back() == '\n' || text.back() == '\r' || text.back() == ' ')) text.pop_back();
    return text;
  }

  void require_format() const {
    const auto version = word("version"), order = word("byteorder");
    if (!version) refuse("no version", {{"folder", folder_}});
    int64_t number = 0;
    const auto parsed = std::from_chars(version->data(), version->data() + version->size(), number);
    if (parsed.ec != std::errc{} || parsed.ptr != version->data() + version->size() || number < 1 || number > kNewestVersion)
      refuse("a version of the container that longhand does not know", {{"version", printable(*version)}, {"expected", "1 to 10"}});
    if (order && *order != "little") refuse("another order of bytes", {{"byteorder", printable(*order)}, {"expected", "little"}});
  }

  const PickleValue& state_dict(const PickleValue& root) const {
    if (root.kind != Kind::dict) refuse("does not hold a state dict", {{"expected", "a dict of names and tensors"}}, &root);
    if (root.items.size() != 2 || root.items[1]->kind != Kind::dict) return root;
    const std::string_view key = root.items[0]->text;
    return key == "state_dict" || key == "model" ? *root.items[1] : root;
  }

  int64_t size(const PickleValue& value, const char* what) const {
    if (value.kind != Kind::integer || value.integer < 0) refuse(std::string(what) + " is not a non-negative integer", {}, &value);
    return value.integer;
  }

  std::vector<int64_t> sizes(const PickleValue& value, const char* what) const {
    if (value.kind != Kind::tuple) refuse(std::string(what) + " is not a tuple", {}, &value);
    std::vector<int64_t> out;
    for (const PickleValue* item : value.items) out.push_back(size(*item, what));
    return out;
  }

  struct StorageView {
    const StorageClass* kind = nullptr;
    int64_t numel = 0;
    Tensor all;  // [numel]; undefined for classes that hold no weights
  };

  const StorageView& storage(const PickleValue& value) {
    if (value.kind != Kind::persistent) refuse("a tensor without a storage", {}, &value);
    const auto& id = value.items[0]->items;
    if (id.size() != 5 || id[0]->kind != Kind::text || id[0]->text != "storage" || id[1]->kind != Kind::global ||
        id[2]->kind != Kind::text || id[3]->kind != Kind::text)
      refuse("a storage is not named as (\"storage\", class, key, location, size)", {}, &value);
    const StorageClass* kind = nullptr;
    for (const StorageClass& row : kStorageClasses)
      if (is_global(*id[1], row.name)) kind = &row;
    if (kind == nullptr) refuse("a storage whose class is none", {}, id[1]);
    const std::string key(id[2]->text);
    if (key.empty() || key.size() > 20 || key.find_first_not_of("0123456789") != std::string::npos)
      refuse("the key of a storage is not a decimal number", {{"key", printable(key)}}, id[2]);
    const int64_t numel = size(*id[4], "the size of a storage");

    const auto [found, fresh] = storages_.try_emplace(key);
    StorageView& view = found->second;
    if (!fresh) {
      if (view.kind != kind || view.numel != numel)
        refuse("one storage is named in two ways",
               {{"key", key},
                {"first", std::string(view.kind->name) + " of " + std::to_string(view.numel)},
                {"then", std::string(kind->name) + " of " + std::to_string(numel)}},
               &value);
      return view;
    }
    view.kind = kind;
    view.numel = numel;
    if (!kind->dtype) return view;
    const std::string entry = folder_ + "/data/" + key;
    const auto stored = archive_.entries().find(entry);
    if (stored == archive_.entries().end()) refuse("a storage is missing", {{"entry", entry}}, &value);
    int64_t bytes = 0;
    if (__builtin_mul_overflow(numel, size_of(*kind->dtype), &bytes) || static_cast<uint64_t>(bytes) != stored->second.size)
      refuse("a storage has another size than its entry",
             {{"entry", entry},
              {"bytes", std::to_string(stored->second.size)},
              {"expected", std::to_string(numel) + " elements of " + name_of(*kind->dtype)}},
             &value);
    const std::byte* data = archive_.bytes(stored->second).data();
    if (checksums_ == Checksums::all) {
      archive_.verify(entry);
      file_.release_pages(data, stored->second.size);
    }
    if (reinterpret_cast<std::uintptr_t>(data) % static_cast<std::uintptr_t>(size_of(*kind->dtype)) == 0) {
      view.all = Tensor::borrow(*kind->dtype, {numel}, data, std::make_shared<MappedFile>(file_));
    } else {
      view.all = Tensor::empty(Device::cpu(), *kind->dtype, {numel});
      if (bytes > 0) std::memcpy(view.all.raw(), data, static_cast<std::size_t>(bytes));
    }
    return view;
  }

  Tensor tensor(const PickleValue& value) {
    if (value.kind != Kind::call) refuse("an entry of the state dict is not a tensor", {}, &value);
    const auto& arguments = value.items[1]->items;
    if (is_global(*value.items[0], "_rebuild_parameter")) {
      if (arguments.size() != 3 || arguments[0]->kind != Kind::call || !is_global(*arguments[0]->items[0], "_rebuild_tensor_v2"))
        refuse("_rebuild_parameter takes a tensor, requires_grad and hooks", {}, &value);
      require_no_hooks(*arguments[1], *arguments[2], value);
      return tensor(*arguments[0]);
    }
    if (arguments.size() != 6 && arguments.size() != 7)
      refuse("_rebuild_tensor_v2 takes 6 or 7 arguments", {{"found", std::to_string(arguments.size())}}, &value);
    require_no_hooks(*arguments[4], *arguments[5], value);
    const StorageView& view = storage(*arguments[0]);
    if (!view.kind->dtype) refuse("a weight of a type that no weight has", {{"found", view.kind->name}}, &value);
    const int64_t offset = size(*arguments[1], "the offset of a tensor");
    const auto shape = sizes(*arguments[2], "the shape of a tensor"), strides = sizes(*arguments[3], "the strides of a tensor");
    if (shape.size() != strides.size()) refuse("a tensor has not as many strides as sizes", {}, &value);
    if (shape.size() > static_cast<std::size_t>(Shape::kMaxRank)) refuse("more axes than a tensor can have", {}, &value);
    try {
      return view_of(view, offset, shape, strides, value);
    } catch (const TooLarge&) {
      refuse("sizes and strides of a tensor are over 2^48", {}, &value);
    }
  }

  void require_no_hooks(const PickleValue& requires_grad, const PickleValue& hooks, const PickleValue& call) const {
    if (requires_grad.kind != Kind::boolean) refuse("requires_grad is not a bool", {}, &call);
    if (hooks.kind != Kind::dict || !hooks.items.empty()) refuse("a tensor with hooks", {{"expected", "an empty OrderedDict"}}, &call);
  }

  Tensor view_of(const StorageView& view, int64_t offset, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                 const PickleValue& value) {
    int64_t numel = 1, last = plus(offset, 0), step = 1;  // elements | largest index in the storage | the row-major stride
    for (const int64_t n : shape) numel = times(numel, std::max<int64_t>(n, 1));  // the strides of an empty tensor must fit too
    if (std::find(shape.begin(), shape.end(), 0) != shape.end())
      return Tensor::empty(Device::cpu(), *view.kind->dtype, Shape(shape.begin(), shape.end()));
    bool row_major = true;
    for (std::size_t i = shape.size(); i-- > 0;) {
      last = plus(last, times(shape[i] - 1, strides[i]));
      row_major = row_major && (shape[i] == 1 || strides[i] == step);
      step = times(step, shape[i]);
    }
    const auto sizes_text = [&] {
      return Shape(shape.begin(), shape.end()).str() + ", strides " + Shape(strides.begin(), strides.end()).str();
    };
    if (last >= view.numel)
      refuse("a tensor reaches outside its storage",
             {{"shape", sizes_text()}, {"offset", std::to_string(offset)}, {"storage", std::to_string(view.numel) + " elements"}}, &value);
    if (numel > view.numel)
      refuse("a tensor has more elements than its storage",
             {{"shape", sizes_text()}, {"storage", std::to_string(view.numel) + " elements"}}, &value);
    const Shape sizes_of_view(shape.begin(), shape.end());
    if (row_major) return view.all.slice(0, offset, offset + numel).reshape(sizes_of_view);

    copied_bytes_ += static_cast<uint64_t>(numel * size_of(*view.kind->dtype));
    if (copied_bytes_ > file_.size())
      refuse("strided tensors whose copies would be larger than the file", {{"bytes", std::to_string(copied_bytes_)}}, &value);
    const Tensor copied = Tensor::empty(Device::cpu(), *view.kind->dtype, sizes_of_view);
    const auto element = static_cast<std::size_t>(size_of(*view.kind->dtype));
    const auto* from = static_cast<const std::byte*>(view.all.raw());
    auto* to = static_cast<std::byte*>(copied.raw());
    for (int64_t i = 0; i < numel; ++i, to += element) {
      int64_t rest = i, at = offset;
      for (std::size_t axis = shape.size(); axis-- > 0; rest /= shape[axis]) at += rest % shape[axis] * strides[axis];
      std::memcpy(to, from + static_cast<std::size_t>(at) * element, element);
    }
    return copied;
  }

  MappedFile file_;
  ZipArchive archive_;
  Checksums checksums_;
  std::string folder_, name_;  // of the archive | of the tensor at hand
  std::map<std::string, StorageView> storages_;
  uint64_t copied_bytes_ = 0;
};

// --- writing --------------------------------------------------------------------------------------------------

// The operations of a state dict's pickle. What repeats is stored in the memo once.
class PickleText {
 public:
  PickleText() { out_ = "\x80\x02"; }

  void begin_dict() {
    global("collections", "OrderedDict");
    out_ += ")R(";
  }
  void tensor(const std::string& name, const char* storage_class, const std::string& key, int64_t storage_numel, const Shape& shape) {
    text(name);
    global("torch._utils", "_rebuild_tensor_v2");
    out_ += "((";
    once("storage", [&] { text("storage"); });
    global("torch", storage_class);
    text(key);
    once("cpu", [&] { text("cpu"); });
    integer(storage_numel);
    out_ += "tQ";
    integer(0);  // offset
    out_ += '(';
    for (const int64_t n : shape) integer(n);
    out_ += "t(";
    for (int axis = 0; axis < shape.rank(); ++axis) {
      int64_t stride = 1;
      for (int inner = axis + 1; inner < shape.rank(); ++inner) stride *= shape[inner];
      integer(stride);
    }
    out_ += "t\x89";  // requires_grad False
    global("collections", "OrderedDict");
    out_ += ")RtR";
  }
  std::string finish() { return out_ + "u."; }

 private:
  template <class F>
  void once(const std::string& what, F&& write) {
    const auto [found, fresh] = memo_.try_emplace(what, memo_.size());
    const auto slot = static_cast<char>(found->second);  // fewer than 128 different things repeat
    if (fresh) write();
    out_ += {fresh ? 'q' : 'h', slot};
  }
  void global(const char* module, const char* name) {
    once(std::string(module) + " " + name, [&] { out_ += std::string("c") + module + "\n" + name + "\n"; });
  }
  void number(uint64_t value, int bytes) {
    for (int i = 0; i < bytes; ++i) out_ += static_cast<char>((value >> (8 * i)) & 0xFF);
  }
  void text(const std::string& value) {
    out_ += 'X';
    number(value.size(), 4);
    out_ += value;
  }
  void integer(int64_t value) {
    const auto bits = static_cast<uint64_t>(value);
    if (value < 256) out_ += 'K', number(bits, 1);
    else if (value < 65536) out_ += 'M', number(bits, 2);
    else if (value < int64_t{1} << 31) out_ += 'J', number(bits, 4);
    else out_ += "\x8a\x08", number(bits, 8);
  }

  std::string out_;
  std::map<std::string, std::size_t> memo_;
};

const char* storage_class_of(const std::string& path, const std::string& name, Dtype dtype) {
  for (const StorageClass& row : kStorageClasses)
    if (row.dtype == dtype) return row.name;
  throw DtypeError("torch file: only floating tensors are written", {{"file", path}, {"tensor", name}, {"dtype", name_of(dtype)}});
}

}  // namespace

NamedTensors read_torch_file(const std::string& path, Checksums checksums) {
  const MappedFile file(path);
  const std::string_view text(reinterpret_cast<const char*>(file.bytes().data()), file.size());
  const auto refuse = [&](const char* rule, const char* hint) {
    return FileError(std::string("torch file: ") + rule, {{"file", path}, {"byte", "0"}, {"try", hint}});
  };
  constexpr const char* kConvert = "in Python: torch.save(torch.load(path, weights_only=True), new_path) with torch 1.6 or newer";
  if (text.starts_with(std::string_view(kLegacyMagic, sizeof(kLegacyMagic) - 1))) throw refuse("the format of torch before 1.6", kConvert);
  if (text.size() > kTarMagicAt && text.substr(kTarMagicAt).starts_with("ustar"))
    throw refuse("a tar file, the oldest format of torch", kConvert);
  if (is_git_lfs_pointer(text))
    throw refuse("a Git LFS pointer instead of the file itself", "git lfs pull in the folder of the repository");
  return Reader(file, checksums).read();
}

void write_torch_file(const std::string& path, const std::map<std::string, Tensor>& tensors, const TensorFileOptions& options) {
  struct Stored {
    const std::string* name;
    const Tensor* tensor;
  };
  std::vector<Stored> storages;                                         // the key of a storage is its place
  std::map<std::pair<const void*, std::string>, std::size_t> by_place;  // memory, with the dtype and shape that it is seen in
  PickleText index;
  index.begin_dict();
  for (const auto& [name, tensor] : tensors) {
    if (!is_tensor_name(name) || !is_utf8(name))
      throw FileError("torch file: no name for a tensor", {{"file", path}, {"tensor", printable(name)}});
    const char* storage_class = storage_class_of(path, name, stored_dtype(tensor, options));
    std::size_t key = storages.size();
    if (tensor.numel() > 0 && tensor.is_contiguous()) key = by_place.try_emplace({tensor.raw(), tensor.describe()}, key).first->second;
    if (key == storages.size()) storages.push_back({&name, &tensor});
    index.tensor(name, storage_class, std::to_string(key), tensor.numel(), tensor.shape());
  }
  const std::string text = index.finish();
  write_file_atomically(path, [&](OutputFile& out) {
    ZipWriter zip(out);
    zip.add("archive/data.pkl", text);
    zip.add("archive/byteorder", "little");
    for (std::size_t key = 0; key < storages.size(); ++key) {
      const Tensor stored = to_stored(*storages[key].name, *storages[key].tensor, options);
      zip.add("archive/data/" + std::to_string(key), stored.raw(), static_cast<std::size_t>(stored.numel() * size_of(stored.dtype())));
      if (options.on_written) options.on_written(*storages[key].tensor);
    }
    zip.add("archive/version", "3\n");
    zip.finish();
  });
}

}  // namespace longhand
