// Damaged files of every kind, thousands of them: each is read or refused with an Error, whatever the damage. The coverage-guided form of
// this is tests/fuzz/run.sh; what that found stands here by name.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <tuple>

#include "core/files.h"
#include "core/philox.h"
#include "core/safetensors.h"
#include "core/tensor.h"
#include "tests/fuzz/readers.h"
#include "tests/support/check.h"

namespace longhand::test {
namespace {

// One of the small changes that files suffer, or that somebody makes on purpose.
std::string damaged(std::string bytes, const std::string& other, uint64_t key) {
  for (uint64_t round = 0, rounds = 1 + philox_u64(key, 0) % 3; round < rounds; ++round) {
    auto draw = [&, n = uint64_t{0}](uint64_t below) mutable {
      return static_cast<std::size_t>(philox_u64(key, 1 + round, ++n) % std::max<uint64_t>(below, 1));
    };
    const std::size_t at = draw(bytes.size() + 1);
    switch (draw(8)) {
      case 0:
        bytes.resize(at);
        break;  // cut off
      case 1:
        if (at < bytes.size()) bytes[at] ^= static_cast<char>(1 << draw(8));
        break;  // one bit
      case 2:
        if (at < bytes.size()) bytes[at] = static_cast<char>(draw(256));
        break;
      case 3:
        bytes.erase(at, 1 + draw(16));
        break;
      case 4:
        bytes.insert(at, bytes.substr(draw(bytes.size()), 1 + draw(32)));
        break;  // a part twice
      case 5:
        bytes.insert(at, other.substr(draw(other.size()), draw(64)));
        break;  // a part of another file
      case 6:   // a number at its bounds
        for (std::size_t i = 0, n = std::size_t{1} << draw(4); i < n && at + i < bytes.size(); ++i)
          bytes[at + i] = static_cast<char>(philox_u64(key, 9, round) % 2 ? 0xFF : 0);
        break;
      default: {  // a digit
        const auto digit = bytes.find_first_of("0123456789", at);
        if (digit != std::string::npos)
          bytes.replace(digit, 1, philox_u64(key, 8, round) % 2 ? "-9223372036854775808" : "18446744073709551615");
      }
    }
  }
  return bytes;
}

TEST("fuzz: damaged files of every kind are read or refused, nothing else") {
  const char* given = std::getenv("LONGHAND_FUZZ_INPUTS");
  const uint64_t inputs = given == nullptr ? 1500 : std::stoull(given);
  const ScratchFolder scratch;
  for (const Reader& reader : readers()) {
    CAPTURE(reader.name);
    const auto samples = samples_of(reader, scratch.path());
    REQUIRE(!samples.empty());
    for (std::size_t i = 0; i < samples.size(); ++i) {
      const auto refusal = read_bytes(reader, scratch.path(), samples[i]);
      if (reader.name == std::string("jsonl") && i == 0) CHECK(refusal);  // "bad": one of its lines is none
      else CHECK_MESSAGE(!refusal, refusal.value_or(""));
    }
    uint64_t taken = 0;
    for (uint64_t i = 0; i < inputs; ++i) {
      CAPTURE(i);
      const std::string input = damaged(samples[i % samples.size()], samples[(i + 1) % samples.size()], i);
      bool refused = false;
      CHECK_NOTHROW(refused = read_bytes(reader, scratch.path(), input).has_value());
      taken += refused ? 0 : 1;
    }
    CHECK(taken < inputs);
  }
}

// --- what coverage-guided fuzzing found ---------------------------------------------------------------------------

const Reader& reader_named(const std::string& name) {
  for (const Reader& reader : readers())
    if (reader.name == name) return reader;
  throw std::logic_error(name);
}

TEST("fuzz: a number of a cursor that has a fraction, or does not fit into 64 bits, is refused") {
  const ScratchFolder scratch;
  const auto cursor_with = [](const std::string& number) {
    return R"({"made_with":{},"batches":0,"next":[0,-1,)" + number + R"(,0],"block":0,"first_row":0,"used_rows":0,"streams":[]})";
  };
  CHECK_FALSE(read_bytes(reader_named("cursor"), scratch.path(), cursor_with("7")));
  for (const std::string& number :
       {std::string(127, '8'), std::string("1e300"), std::string("0.5"), std::string("true"), std::string("\"7\"")})
    CHECK_MESSAGE(read_bytes(reader_named("cursor"), scratch.path(), cursor_with(number)), number);
}

TEST("fuzz: a token cache whose table puts a document in front of the first token is refused, not given memory") {
  const ScratchFolder scratch;
  const Reader& reader = reader_named("cache");
  std::string bytes = samples_of(reader, scratch.path()).at(0);
  uint64_t table_at = 0;
  std::memcpy(&table_at, bytes.data() + bytes.size() - 88 + 32, sizeof table_at);  // data/README.md
  REQUIRE(table_at + 24 < bytes.size());
  bytes.at(table_at + 7) = '\xC0';  // the highest byte of the first document's first token
  CHECK_NOTHROW(CHECK(read_bytes(reader, scratch.path(), bytes)));
}

// --- what was found by reading the readers ------------------------------------------------------------------------

std::string replaced(std::string text, const std::string& part, const std::string& by) {
  const auto at = text.find(part);
  REQUIRE_MESSAGE(at != std::string::npos, part);
  return text.replace(at, part.size(), by);
}

TEST("fuzz: a cursor whose counts lie below zero, or that has too few streams, resumes no run and reads no memory of others") {
  const ScratchFolder scratch;
  const Reader& reader = reader_named("training");
  const auto samples = samples_of(reader, scratch.path());  // packed, streams
  const auto refusal = [&](std::size_t sample, const std::string& part, const std::string& by) {
    return read_bytes(reader, scratch.path(), replaced(samples.at(sample), part, by)).value_or("taken");
  };
  const auto number_of = [&](const std::string& key) {
    const auto at = samples[0].find("\"" + key + "\":");
    REQUIRE(at != std::string::npos);
    return samples[0].substr(at, samples[0].find_first_of(",}\n", at) - at);
  };
  for (const char* key : {"used_rows", "block", "first_row", "batches", "tokens"})
    for (const char* value : {"-1", "-9223372036854775807", "9223372036854775807"}) {
      const std::string text = refusal(0, number_of(key), std::string("\"") + key + "\": " + value);
      CHECK_MESSAGE(text.find("a count that cannot be") != std::string::npos, key << " " << value << ": " << text);
    }
  const auto list = samples[1].find("\"streams\": [");
  REQUIRE(list != std::string::npos);
  const auto end = samples[1].find("}", samples[1].find("\"started\"", list));
  const std::string one_row = samples[1].substr(0, end + 1) + "]}}";
  CHECK(read_bytes(reader, scratch.path(), one_row).value_or("taken").find("another number of streams") != std::string::npos);
}

TEST("fuzz: a state whose one tensor is of a far layer is refused before room is made for the layers between") {
  const ScratchFolder scratch;
  write_safetensors(scratch.file("far"), {{"layers.99999.ssm", Tensor::zeros(Device::cpu(), Dtype::f32, {1, 1})}});
  const auto refusal = read_bytes(reader_named("state"), scratch.path(), read_text_file(scratch.file("far")));
  CHECK(refusal.value_or("taken").find("layers.99999.ssm") != std::string::npos);  // by that name
}

TEST("fuzz: a bAbI story that would hold its facts thousands of times is refused") {
  const ScratchFolder scratch;
  std::string story;
  for (int line = 1; line <= 8000; line += 2)
    story += std::to_string(line) + " x\n" + std::to_string(line + 1) + " y\tz\t" + std::to_string(line) + "\n";
  const std::string text = read_bytes(reader_named("babi"), scratch.path(), story).value_or("taken");
  CHECK_MESSAGE(text.find("a story of more than 1,000 lines") != std::string::npos, text);
}

TEST("fuzz: a few bytes that ask for a window of 112 MiB, and fill it, are refused") {
  const ScratchFolder scratch;
  const std::string frame("\x28\xB5\x2F\xFD\x00\x86", 6), block("\x02\x00\x10\n", 4);  // of zstd: a window; 128 Ki times a newline
  std::string file = frame;
  for (int i = 0; i < 400; ++i) file += block;
  for (const char* reader : {"babi", "lambada", "zstd"}) {
    const std::string text = read_bytes(reader_named(reader), scratch.path(), file).value_or("taken");
    CHECK_MESSAGE(text.find("frame 1 unpacks to more than a file of this size may hold") != std::string::npos, reader, ": ", text);
  }
}

TEST("fuzz: moments that are not finite, and counts that cannot be, resume no run") {
  const ScratchFolder scratch;
  const Reader& reader = reader_named("optimizer");
  write_safetensors(scratch.file("x"), {});
  std::ofstream(scratch.file("sound"), std::ios::binary) << samples_of(reader, scratch.path()).at(0);
  for (const auto& [tensor, value, said] : {std::tuple("second_moment.backbone.norm_f.weight", HUGE_VAL, "is not finite"),
                                            std::tuple("counts", -1.0, "a count"), std::tuple("counts", 1e300, "a count")}) {
    auto tensors = read_safetensors(scratch.file("sound")).tensors;
    REQUIRE(tensors.contains(tensor));
    tensors[tensor] = tensors[tensor].clone();
    fill(tensors[tensor], value);
    write_safetensors(scratch.file("x"), tensors);
    const std::string text = read_bytes(reader, scratch.path(), read_text_file(scratch.file("x"))).value_or("taken");
    CHECK_MESSAGE(text.find(said) != std::string::npos, tensor << ": " << text);
  }
}

}  // namespace
}  // namespace longhand::test
