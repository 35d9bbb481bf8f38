// Files of torch.save: what is written is read back, hand-made ones show every rule, damaged ones never do harm.
#include "core/torch_file.h"

#include <filesystem>
#include <fstream>

#include "core/crc32.h"
#include "core/error.h"
#include "core/philox.h"
#include "core/safetensors.h"
#include "core/zip_archive.h"
#include "tests/support/check.h"

using namespace longhand;
using namespace longhand::test;

namespace {

void write_bytes(const std::string& path, const std::string& bytes) {
  std::filesystem::remove(path);  // some file systems wait for the disk when a file is written over
  std::ofstream(path, std::ios::binary) << bytes;
}

using Entries = std::vector<std::pair<std::string, std::string>>;

void write_archive(const std::string& path, const Entries& entries) {
  write_file_atomically(path, [&](OutputFile& out) {
    ZipWriter zip(out);
    for (const auto& [name, data] : entries) zip.add(name, data);
    zip.finish();
  });
}

std::string refusal(const std::string& path, Checksums checksums = Checksums::index) {
  try {
    read_torch_file(path, checksums);
  } catch (const FileError& error) {
    CHECK(std::string(error.what()).find(path) != std::string::npos);
    return error.what();
  }
  return "";
}

std::string unicode(const std::string& text) {
  return std::string("X") + static_cast<char>(text.size()) + std::string(3, '\0') + text;
}
std::string integer(int64_t value) {
  std::string out = "\x8a\x08";
  for (int i = 0; i < 8; ++i) out += static_cast<char>((static_cast<uint64_t>(value) >> (8 * i)) & 0xFF);
  return out;
}
std::string tuple_of(const std::vector<int64_t>& values) {
  std::string out = "(";
  for (const int64_t value : values) out += integer(value);
  return out + "t";
}
std::string storage(const std::string& kind, const std::string& key, int64_t numel) {
  return "(" + unicode("storage") + "ctorch\n" + kind + "\n" + unicode(key) + unicode("cuda:0") + integer(numel) + "tQ";
}
const std::string kNoHooks = "ccollections\nOrderedDict\n)R";

// A tensor over `storage`.
std::string tensor(const std::string& of, int64_t offset, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides) {
  return "ctorch._utils\n_rebuild_tensor_v2\n(" + of + integer(offset) + tuple_of(shape) + tuple_of(strides) + "\x89" + kNoHooks + "tR";
}
std::string dict(const std::vector<std::pair<std::string, std::string>>& items) {
  std::string out = "}(";
  for (const auto& [name, value] : items) out += unicode(name) + value;
  return out + "u";
}
std::string pickle(const std::string& value) {
  return "\x80\x02" + value + ".";
}

std::string f32_bytes(const std::vector<float>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)};
}

// An archive whose state dict is `value`; storage "0" holds 0, 1 .. 5 in f32.
Entries archive(const std::string& value) {
  return {{"m/data.pkl", pickle(value)}, {"m/byteorder", "little"}, {"m/data/0", f32_bytes({0, 1, 2, 3, 4, 5})}, {"m/version", "3\n"}};
}

std::string refusal_of(const Entries& entries) {
  const ScratchFolder scratch;
  write_archive(scratch.file("m.bin"), entries);
  return refusal(scratch.file("m.bin"));
}

void check_refused(const std::string& value, const std::string& rule) {
  const std::string text = refusal_of(archive(value));
  CHECK_MESSAGE(text.find(rule) != std::string::npos, rule << " in " << text);
}

NamedTensors read(const Entries& entries) {
  const ScratchFolder scratch;
  write_archive(scratch.file("m.bin"), entries);
  return read_torch_file(scratch.file("m.bin"), Checksums::all);
}

const std::string kSix = storage("FloatStorage", "0", 6);
const std::string kWhole = tensor(kSix, 0, {2, 3}, {3, 1});

// Reads a file and every element in it; whether it was a file of tensors. Anything but a FileError escapes.
template <class Read>
bool survives(const Read& read_file) {
  try {
    for (const auto& [name, t] : read_file().tensors) (void)first_non_finite(t);
    return true;
  } catch (const FileError&) {
    return false;
  }
}

// Ten thousand deterministic changes to bytes [begin, end) of a file: bits turned, bytes replaced; in a whole file also pieces taken out or
// put in twice, and the end cut off.
template <class Read>
void mutate(const std::string& whole, std::size_t begin, std::size_t end, const std::string& path, uint64_t seed, const Read& read_file) {
  int accepted = 0;
  constexpr int kRounds = 10'000;
  for (uint64_t round = 0; round < kRounds; ++round) {
    std::string bytes = whole;
    uint64_t draw = 0;
    const auto below = [&](uint64_t n) {
      const PhiloxBlock block = philox(seed, round, draw++);
      return (uint64_t{block.word[0]} << 32 | block.word[1]) % n;
    };
    const bool keep_size = end - begin < whole.size();
    const uint64_t changes = 1 + below(4);
    for (uint64_t i = 0; i < changes && bytes.size() > begin; ++i) {
      const uint64_t at = begin + below(std::min(end, bytes.size()) - begin);
      const uint64_t kind = below(keep_size ? 13 : 16);
      if (kind < 7) bytes[at] = static_cast<char>(static_cast<unsigned char>(bytes[at]) ^ (1u << below(8)));
      else if (kind < 12) bytes[at] = static_cast<char>(below(256));
      else if (kind < 13) bytes[at] = whole[begin + below(end - begin)];
      else if (kind < 14) bytes.erase(at, 1 + below(8));
      else if (kind < 15) bytes.insert(at, bytes.substr(below(bytes.size()), 1 + below(16)));
      else bytes.resize(at);
    }
    write_bytes(path, bytes);
    accepted += survives(read_file) ? 1 : 0;
  }
  CHECK(accepted > 0);        // changes that mean nothing
  CHECK(accepted < kRounds);  // and others
}

}  // namespace

TEST("torch file: tensors of every floating type survive, names of one memory share one storage") {
  const ScratchFolder scratch;
  const Device cpu = Device::cpu();
  const Tensor a = Tensor::from(cpu, {2, 3}, std::vector<float>{1, -2, 3, 4, 5, 6});
  const std::map<std::string, Tensor> written{{"a", a},
                                              {"tied", a},
                                              {"rows", a.reshape({6})},
                                              {"half", a.to(Dtype::f16)},
                                              {"brain", a.to(Dtype::bf16)},
                                              {"wide", a.to(Dtype::f64)},
                                              {"scalar", Tensor::full(cpu, Dtype::f32, {}, 4)},
                                              {"nothing", Tensor::empty(cpu, Dtype::f32, {0, 5})},
                                              {"view", a.slice(-1, 1, 3)},
                                              {"long", Tensor::full(cpu, Dtype::bf16, {70'000}, 0.5)}};
  write_torch_file(scratch.file("t.bin"), written);
  const NamedTensors found = read_torch_file(scratch.file("t.bin"), Checksums::all);
  CHECK(found.tensors.size() == written.size());
  for (const auto& [name, t] : written) {
    CAPTURE(name);
    CHECK(found.at(name).shape() == t.shape());
    CHECK(found.at(name).dtype() == t.dtype());
    CHECK(found.at(name).to_vector<double>() == t.to_vector<double>());
  }
  CHECK(found.at("a").same_storage(found.at("tied")));
  CHECK_FALSE(found.at("a").same_storage(found.at("half")));
  CHECK_THROWS_WITH_AS(write_torch_file(scratch.file("i.bin"), {{"ids", Tensor::zeros(cpu, Dtype::i32, {2})}}), doctest::Contains("ids"),
                       DtypeError);
  CHECK_THROWS_AS(read_torch_file(scratch.file("i.bin")), FileError);  // nothing was left behind
}

TEST("torch file: tensors are stored in another type where asked, and what does not fit is named") {
  const ScratchFolder scratch;
  const Tensor a = Tensor::from(Device::cpu(), {2}, std::vector<float>{0.1f, 65504});
  const Tensor large = Tensor::from(Device::cpu(), {2}, std::vector<float>{1, 1e5f}), ids = Tensor::zeros(Device::cpu(), Dtype::i64, {1});
  const TensorFileOptions half{.stored_as = Dtype::f16, .on_written = {}};
  write_torch_file(scratch.file("a.bin"), {{"a", a}}, half);
  write_safetensors(scratch.file("a.safetensors"), {{"a", a}, {"ids", ids}}, {}, half);
  CHECK(read_torch_file(scratch.file("a.bin")).at("a").to_vector<float>() == a.to(Dtype::f16).to_vector<float>());
  CHECK(read_safetensors(scratch.file("a.safetensors")).at("a").dtype() == Dtype::f16);
  CHECK(read_safetensors(scratch.file("a.safetensors")).at("ids").dtype() == Dtype::i64);
  const Tensor small = Tensor::from(Device::cpu(), {5}, std::vector<float>{0, -0.0f, 0x1p-24f, 0x1p-26f, -1e-9f});
  std::map<std::string, int64_t> zeroed;
  TensorFileOptions counting = half;
  counting.on_zeroed = [&](const std::string& name, int64_t values) { zeroed[name] += values; };
  write_torch_file(scratch.file("a.bin"), {{"a", a}, {"small", small}}, counting);
  write_safetensors(scratch.file("a.safetensors"), {{"a", a}, {"tiny", small}, {"ids", ids}}, {}, counting);
  CHECK(zeroed == std::map<std::string, int64_t>{{"small", 2}, {"tiny", 2}});
  CHECK_THROWS_WITH_AS(write_torch_file(scratch.file("b.bin"), {{"large", large}}, half), doctest::Contains("large"), NumericError);
  CHECK_THROWS_WITH_AS(write_safetensors(scratch.file("b.safetensors"), {{"large", large}}, {}, half), doctest::Contains("100000"),
                       NumericError);
}

TEST("torch file: hand-made state dicts, with wrappers, parameters, views and strides") {
  const std::string parameter = "ctorch._utils\n_rebuild_parameter\n(" + kWhole + "\x88" + kNoHooks + "tR";
  const NamedTensors found = read(archive(dict({{"whole", kWhole},
                                                {"parameter", parameter},
                                                {"row", tensor(kSix, 3, {3}, {1})},
                                                {"transposed", tensor(kSix, 0, {3, 2}, {1, 3})},
                                                {"every other", tensor(kSix, 1, {3}, {2})},
                                                {"scalar", tensor(kSix, 4, {}, {})},
                                                {"nothing", tensor(kSix, 99, {0, 7}, {7, 1})},
                                                {"ones", tensor(kSix, 2, {1, 1, 2}, {77, 88, 1})}})));
  CHECK(found.at("whole").to_vector<double>() == std::vector<double>{0, 1, 2, 3, 4, 5});
  CHECK(found.at("parameter").same_storage(found.at("whole")));
  CHECK(found.at("row").to_vector<double>() == std::vector<double>{3, 4, 5});
  CHECK(found.at("row").same_storage(found.at("whole")));
  CHECK(found.at("transposed").shape() == Shape{3, 2});
  CHECK(found.at("transposed").to_vector<double>() == std::vector<double>{0, 3, 1, 4, 2, 5});
  CHECK(found.at("every other").to_vector<double>() == std::vector<double>{1, 3, 5});
  CHECK(found.at("scalar").to_vector<double>() == std::vector<double>{4});
  CHECK(found.at("nothing").shape() == Shape{0, 7});
  CHECK(found.at("ones").to_vector<double>() == std::vector<double>{2, 3});
  for (const char* wrapper : {"state_dict", "model"}) CHECK(read(archive(dict({{wrapper, dict({{"w", kWhole}})}}))).contains("w"));
  // A state dict of a module: an OrderedDict with its _metadata set by BUILD.
  const std::string module = "ccollections\nOrderedDict\n)R(" + unicode("w") + kWhole + "u}" + unicode("_metadata") + kNoHooks + "sb";
  CHECK(read(archive(module)).tensors.size() == 1);
}

TEST("torch file: each broken rule of the state dict is refused by name") {
  const auto one = [](const std::string& value) { return dict({{"w", value}}); };
  check_refused(kWhole, "does not hold a state dict");
  check_refused(dict({{"optimizer", dict({{"w", kWhole}})}}), "not a tensor");
  check_refused(dict({{"w", kWhole}, {"step", integer(3)}}), "not a tensor");
  check_refused(dict({{"w", kWhole}, {"w", kWhole}}), "two tensors of one name");
  check_refused(dict({{"a\nb", kWhole}}), "no name of a tensor");
  check_refused("}" + integer(3) + kWhole + "s", "no name of a tensor");
  check_refused(one(tensor(kSix, 1, {2, 3}, {3, 1})), "reaches outside its storage");
  check_refused(one(tensor(kSix, 0, {2}, {6})), "reaches outside its storage");
  check_refused(one(tensor(kSix, -1, {2}, {1})), "not a non-negative integer");
  check_refused(one(tensor(kSix, 0, {-2}, {1})), "not a non-negative integer");
  check_refused(one(tensor(kSix, 0, {2}, {-1})), "not a non-negative integer");
  check_refused(one(tensor(kSix, 0, {2, 3}, {1})), "as many strides");
  check_refused(one(tensor(kSix, 0, {1, 1, 1, 1, 1, 1, 1}, {1, 1, 1, 1, 1, 1, 1})), "more axes");
  check_refused(one(tensor(kSix, INT64_MAX, {2}, {1})), "over 2^48");
  check_refused(one(tensor(kSix, 0, {2}, {INT64_MAX})), "over 2^48");
  check_refused(one(tensor(kSix, 0, {int64_t{1} << 40, int64_t{1} << 40}, {0, 0})), "over 2^48");
  check_refused(one(tensor(kSix, 0, {int64_t{1} << 40, int64_t{1} << 40, 0}, {0, 0, 0})), "over 2^48");
  check_refused(one(tensor(kSix, 0, {0, int64_t{1} << 40, int64_t{1} << 40}, {0, 0, 0})), "over 2^48");
  check_refused(one(tensor(kSix, 0, {1'000'000'000}, {0})), "more elements than its storage");
  check_refused(one(tensor(storage("FloatStorage", "0", 7), 0, {2}, {1})), "another size than its entry");
  check_refused(one(tensor(storage("FloatStorage", "0", int64_t{1} << 62), 0, {2}, {1})), "another size than its entry");
  check_refused(one(tensor(storage("HalfStorage", "0", 6), 0, {2}, {1})), "another size than its entry");
  check_refused(one(tensor(storage("FloatStorage", "0", -6), 0, {2}, {1})), "not a non-negative integer");
  check_refused(one(tensor(storage("FloatStorage", "1", 6), 0, {2}, {1})), "a storage is missing");
  check_refused(one(tensor(storage("FloatStorage", "../0", 6), 0, {2}, {1})), "not a decimal number");
  for (const char* kind : {"LongStorage", "IntStorage", "ShortStorage", "CharStorage", "ByteStorage", "BoolStorage"})
    check_refused(one(tensor(storage(kind, "0", 6), 0, {2}, {1})), kind);
  check_refused(dict({{"a", kWhole}, {"b", tensor(storage("HalfStorage", "0", 6), 0, {2}, {1})}}), "named in two ways");
  check_refused(dict({{"a", kWhole}, {"b", tensor(storage("FloatStorage", "0", 5), 0, {2}, {1})}}), "named in two ways");
  check_refused(one(tensor(integer(3), 0, {2}, {1})), "without a storage");
  check_refused(
      one(tensor("(" + unicode("module") + "ctorch\nFloatStorage\n" + unicode("0") + unicode("cpu") + integer(6) + "tQ", 0, {2}, {1})),
      "not named as");
  check_refused(one(tensor("(" + unicode("storage") + "ccollections\nOrderedDict\n" + unicode("0") + unicode("cpu") + integer(6) + "tQ", 0,
                           {2}, {1})),
                "class is none");
  check_refused(one("ctorch._utils\n_rebuild_tensor_v2\n(" + kSix + "tR"), "6 or 7 arguments");
  check_refused(one("ctorch._utils\n_rebuild_parameter\n(" + kSix + "\x88" + kNoHooks + "tR"), "takes a tensor");
  const std::string hooked = dict({{"hook", integer(1)}});
  check_refused(one("ctorch._utils\n_rebuild_parameter\n(" + kWhole + "\x88" + hooked + "tR"), "with hooks");
  check_refused(one("ctorch._utils\n_rebuild_parameter\n(" + kWhole + integer(1) + kNoHooks + "tR"), "requires_grad");
}

TEST("torch file: strided copies larger than the file are refused") {
  const std::string big = storage("FloatStorage", "0", 20'000);
  std::string many = "}(";
  for (int i = 0; i < 3; ++i) many += unicode("t" + std::to_string(i)) + tensor(big, 0, {100, 200}, {1, 100});
  Entries entries = archive(many + "u");
  entries[2].second = std::string(80'000, '\0');
  const std::string text = refusal_of(entries);
  CHECK_MESSAGE(text.find("copies would be larger than the file") != std::string::npos, text);
}

TEST("torch file: each broken rule of the container is refused by name") {
  const Entries good = archive(dict({{"w", kWhole}}));
  REQUIRE(refusal_of(good).empty());
  const auto refused = [](const Entries& entries, const char* rule) {
    const std::string text = refusal_of(entries);
    CHECK_MESSAGE(text.find(rule) != std::string::npos, rule << " in " << text);
  };
  const auto with = [&](std::size_t i, const std::string& name, const std::string& data) {
    Entries entries = good;
    entries[i] = {name, data};
    return entries;
  };
  refused(with(0, "m/other.pkl", "x"), "no data.pkl");
  refused(with(1, "m/byteorder", "big"), "another order of bytes");
  refused(with(1, "n/byteorder", "little"), "entries in two folders");
  refused(with(1, "byteorder", "little"), "outside any folder");
  refused(with(3, "m/version", "11"), "version of the container");
  refused(with(3, "m/version", "0"), "version of the container");
  refused(with(3, "m/version", "three"), "version of the container");
  refused(with(3, "m/version", std::string(1000, '3')), "too long");
  refused(with(3, "m/versions", "3"), "no version");
  refused(with(1, "m/constants.pkl", "little"), "TorchScript");
  refused({}, "does not begin with PK");

  const ScratchFolder scratch;
  const auto refused_bytes = [&](const std::string& bytes, const char* rule) {
    write_bytes(scratch.file("b.bin"), bytes);
    const std::string text = refusal(scratch.file("b.bin"), Checksums::all);
    CHECK_MESSAGE(text.find(rule) != std::string::npos, rule << " in " << text);
  };
  refused_bytes("", "does not begin with PK");
  refused_bytes(std::string("\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M", 18), "torch before 1.6");
  refused_bytes(std::string(257, 'a') + "ustar" + std::string(300, '\0'), "a tar file");
  refused_bytes("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "Git LFS");
  write_archive(scratch.file("m.bin"), good);
  const std::string whole = read_text_file(scratch.file("m.bin"));
  std::string flipped = whole;
  flipped[whole.find(f32_bytes({0, 1, 2, 3, 4, 5})) + 6] ^= 1;
  refused_bytes(flipped, "checksum");
  write_bytes(scratch.file("b.bin"), flipped);
  CHECK(refusal(scratch.file("b.bin"), Checksums::index).empty());  // of the names only
  flipped = whole;
  flipped[whole.find("cuda:0")] ^= 1;
  refused_bytes(flipped, "checksum");
  write_bytes(scratch.file("b.bin"), flipped);
  CHECK(refusal(scratch.file("b.bin"), Checksums::none).empty());
}

TEST("torch file: a file cut off anywhere is refused, and so is a pickle") {
  const ScratchFolder scratch;
  write_archive(scratch.file("m.bin"), archive(dict({{"w", kWhole}})));
  const std::string whole = read_text_file(scratch.file("m.bin"));
  for (std::size_t size = 0; size < whole.size(); ++size) {
    write_bytes(scratch.file("c.bin"), whole.substr(0, size));
    CHECK_MESSAGE(!refusal(scratch.file("c.bin")).empty(), size);
  }
  const std::string index = pickle(dict({{"w", kWhole}}));
  for (std::size_t size = 0; size < index.size(); ++size) {
    Entries entries = archive("");
    entries[0].second = index.substr(0, size);
    CHECK_MESSAGE(!refusal_of(entries).empty(), size);
  }
}

TEST("torch file: ten thousand damaged files load or are refused, and as many with a damaged pickle") {
  const ScratchFolder scratch;
  const std::string path = scratch.file("m.bin");
  const std::string value = dict({{"w", kWhole}, {"v", tensor(kSix, 0, {3, 2}, {1, 3})}, {"u", tensor(kSix, 2, {2}, {1})}});
  write_archive(path, archive(value));
  const std::string whole = read_text_file(path);
  const auto read_file = [&] { return read_torch_file(path, Checksums::none); };
  mutate(whole, 0, whole.size(), path, 1, read_file);
  const std::size_t index = whole.find(pickle(value));
  REQUIRE(index != std::string::npos);
  mutate(whole, index, index + pickle(value).size(), path, 2, read_file);
}

TEST("safetensors: ten thousand damaged files load or are refused, and as many with a damaged header") {
  const ScratchFolder scratch;
  const std::string path = scratch.file("m.safetensors");
  const Tensor a = Tensor::from(Device::cpu(), {2, 3}, std::vector<float>{1, -2, 3, 4, 5, 6});
  write_safetensors(path, {{"a", a}, {"half", a.to(Dtype::f16)}, {"ids", Tensor::zeros(Device::cpu(), Dtype::i64, {3})}},
                    {{"format", "pt"}});
  const std::string whole = read_text_file(path);
  const auto read_file = [&] { return read_safetensors(path); };
  mutate(whole, 0, whole.size(), path, 3, read_file);
  mutate(whole, 0, 200, path, 4, read_file);
}

TEST("torch file: the reference folders' files load, tied heads as one storage") {
  const auto golden = folder_from("LONGHAND_GOLDEN");
  if (!golden) SKIP("LONGHAND_GOLDEN is not set");
  const NamedTensors half = read_torch_file(*golden + "/ss-mamba2-fp16/pytorch_model.bin", Checksums::all);
  CHECK(half.at("backbone.embedding.weight").dtype() == Dtype::f16);
  CHECK(half.at("lm_head.weight").same_storage(half.at("backbone.embedding.weight")));
  const NamedTensors single = read_torch_file(*golden + "/ss-mamba1/pytorch_model.bin", Checksums::all);
  const NamedTensors other = read_safetensors(*golden + "/hf-mamba1/model.safetensors");
  CHECK(single.at("backbone.layers.1.mixer.A_log").dtype() == Dtype::f32);
  CHECK(single.at("backbone.layers.1.mixer.A_log").to_vector<float>() == other.at("backbone.layers.1.mixer.A_log").to_vector<float>());
}
