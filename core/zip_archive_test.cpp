// Zip archives: what is written is read back, also with ZIP64 fields; every rule of the reader.
#include "core/zip_archive.h"

#include <fstream>

#include "core/crc32.h"
#include "core/error.h"
#include "tests/support/check.h"

using namespace longhand;
using namespace longhand::test;

namespace {

constexpr uint64_t kAllWide = 0;

std::string archive_bytes(const std::vector<std::pair<std::string, std::string>>& entries, uint64_t zip64_from = 0xFFFFFFFF) {
  const ScratchFolder scratch;
  write_file_atomically(scratch.file("a"), [&](OutputFile& out) {
    ZipWriter zip(out, zip64_from);
    for (const auto& [name, data] : entries) zip.add(name, data);
    zip.finish();
  });
  return read_text_file(scratch.file("a"));
}

void put(std::string& bytes, std::size_t at, uint64_t value, int width) {
  for (int i = 0; i < width; ++i) bytes[at + static_cast<std::size_t>(i)] = static_cast<char>((value >> (8 * i)) & 0xFF);
}

// Where the record of this signature begins that names `name`.
std::size_t record_of(const std::string& bytes, const std::string& signature, std::size_t name_at, const std::string& name) {
  for (std::size_t at = bytes.find(signature); at != std::string::npos; at = bytes.find(signature, at + 1))
    if (bytes.compare(at + name_at, name.size(), name) == 0) return at;
  FAIL("no such record");
  return 0;
}
std::size_t local(const std::string& bytes, const std::string& name) {
  return record_of(bytes, "PK\3\4", 30, name);
}
std::size_t central(const std::string& bytes, const std::string& name) {
  return record_of(bytes, "PK\1\2", 46, name);
}

std::string refusal(const std::string& bytes) {
  const ScratchFolder scratch;
  std::ofstream(scratch.file("a.zip"), std::ios::binary) << bytes;
  try {
    const ZipArchive archive{MappedFile(scratch.file("a.zip"))};
    for (const auto& [name, entry] : archive.entries()) archive.verify(name);
  } catch (const FileError& error) {
    CHECK(std::string(error.what()).find(scratch.file("a.zip")) != std::string::npos);
    return error.what();
  }
  return "";
}

}  // namespace

TEST("crc32 has the published check value, in one piece or several") {
  const std::string digits = "123456789", text(1001, 'x');
  CHECK(crc32(digits.data(), 9) == 0xCBF43926u);
  CHECK(crc32(nullptr, 0) == 0);
  for (std::size_t cut = 0; cut <= digits.size(); ++cut)
    CHECK(crc32(digits.data() + cut, 9 - cut, crc32(digits.data(), cut)) == 0xCBF43926u);
  for (std::size_t cut : {1u, 8u, 500u, 1000u})
    CHECK(crc32(text.data() + cut, text.size() - cut, crc32(text.data(), cut)) == crc32(text.data(), text.size()));
}

TEST("zip: what is written is read back, aligned, with and without ZIP64 fields") {
  const std::vector<std::pair<std::string, std::string>> entries{
      {"t/data.pkl", "abc"}, {"t/data/0", std::string(1000, '\7')}, {"t/empty", ""}};
  for (const uint64_t from : {uint64_t{0xFFFFFFFF}, uint64_t{500}, kAllWide}) {
    CAPTURE(from);
    const ScratchFolder scratch;
    std::ofstream(scratch.file("a.zip"), std::ios::binary) << archive_bytes(entries, from);
    const ZipArchive archive{MappedFile(scratch.file("a.zip"))};
    CHECK(archive.entries().size() == 3);
    for (const auto& [name, data] : entries) {
      const ZipEntry& entry = archive.entries().at(name);
      CHECK(entry.begin % 64 == 0);
      const auto found = archive.bytes(entry);
      CHECK(std::string(reinterpret_cast<const char*>(found.data()), found.size()) == data);
      archive.verify(name);
    }
  }
}

TEST("zip: a file cut off anywhere, or with bytes behind its end, is refused") {
  const std::string whole = archive_bytes({{"t/data.pkl", "abc"}, {"t/version", "3"}});
  REQUIRE(refusal(whole).empty());
  for (std::size_t size = 0; size < whole.size(); ++size) CHECK_MESSAGE(!refusal(whole.substr(0, size)).empty(), size);
  CHECK(refusal(whole + "x").find("end-of-central-directory") != std::string::npos);
  CHECK(refusal("x" + whole).find("does not begin with PK") != std::string::npos);
}

TEST("zip: each broken rule is refused by name") {
  const std::string whole = archive_bytes({{"t/one", "abcdefgh"}, {"t/two", "12345678"}});
  const auto refused = [](const std::string& bytes, const char* rule) {
    const std::string text = refusal(bytes);
    CHECK_MESSAGE(text.find(rule) != std::string::npos, rule << " in " << text);
  };
  const auto with = [&](std::size_t at, uint64_t value, int width) {
    std::string bytes = whole;
    put(bytes, at, value, width);
    return bytes;
  };
  const std::size_t one = central(whole, "t/one"), two = central(whole, "t/two"), end = whole.size() - 22;
  refused(with(two + 8, 0x801, 2), "an encrypted entry");
  refused(with(local(whole, "t/two") + 6, 0x801, 2), "an encrypted entry");
  refused(with(two + 10, 8, 2), "a compressed entry");
  refused(with(local(whole, "t/two") + 8, 8, 2), "a compressed entry");
  refused(with(two + 20, 7, 4), "two sizes differ");
  refused(with(two + 34, 1, 2), "several disks");
  refused(with(end + 4, 1, 2), "several disks");
  refused(with(end + 8, 1, 2), "several disks");
  refused(with(two + 42, 0xFFFFFF, 4), "outside the file");
  refused(with(two + 42, 1, 4), "no local header");
  refused(with(two + 42, local(whole, "t/one"), 4), "two names");
  refused(with(two + 16, 1, 4), "checksum");
  refused(with(one, 0, 4), "no entry where");
  refused(with(one + 28, 60'000, 2), "over the end of the central directory");
  refused(with(end + 10, 3, 2), "several disks");  // the two counts of the end record
  refused(with(end + 16, one + 1, 4), "does not end at its end record");
  refused(with(end + 12, 0xFFFFFFFE, 4), "does not end at its end record");
  refused(with(end + 16, 0xFFFFFFFF, 4), "ZIP64 record is needed");
  {
    std::string bytes = whole;  // more entries than there are
    put(bytes, end + 8, 60'000, 2), put(bytes, end + 10, 60'000, 2);
    refused(bytes, "more entries than");
    put(bytes, end + 8, 1, 2), put(bytes, end + 10, 1, 2);  // fewer
    refused(bytes, "not as long as it says");
  }
  {
    std::string bytes = whole;  // both sizes reach into the central directory
    put(bytes, two + 20, 4000, 4), put(bytes, two + 24, 4000, 4);
    refused(bytes, "reaches outside the file");
    bytes = whole;  // the first entry's data reach over the second
    put(bytes, one + 20, 70, 4), put(bytes, one + 24, 70, 4);
    refused(bytes, "overlap");
    bytes = whole;  // ZIP64 sizes announced, no field there
    put(bytes, two + 20, 0xFFFFFFFF, 4), put(bytes, two + 24, 0xFFFFFFFF, 4);
    refused(bytes, "ZIP64 field is needed");
  }
  const auto renamed = [&](const std::string& name) {  // of five characters
    std::string bytes = whole;
    bytes.replace(local(whole, "t/two") + 30, 5, name);
    bytes.replace(two + 46, 5, name);
    return bytes;
  };
  refused(renamed("../ab"), "leads out of its folder");
  refused(renamed("ab/.."), "leads out of its folder");
  refused(renamed("/abcd"), "begins with /");
  refused(renamed("a\\bcd"), "backslash");
  refused(renamed(std::string("ab\0cd", 5)), "control character");
  refused(renamed("ab\xff"
                  "cd"),
          "not UTF-8");
  refused(archive_bytes({{"t/one", "a"}, {"t/one", "b"}}), "stands twice");
  refused(archive_bytes({{"", "a"}}), "without a name");
}

TEST("zip: ZIP64 records that do not fit are refused") {
  const std::string whole = archive_bytes({{"t/one", "abcdefgh"}}, kAllWide);
  const auto refused = [](const std::string& bytes, const char* rule) {
    const std::string text = refusal(bytes);
    CHECK_MESSAGE(text.find(rule) != std::string::npos, rule << " in " << text);
  };
  const std::size_t record = whole.size() - 22 - 20 - 56, locator = record + 56, end = locator + 20, one = central(whole, "t/one");
  const auto with = [&](std::size_t at, uint64_t value, int width) {
    std::string bytes = whole;
    put(bytes, at, value, width);
    return bytes;
  };
  REQUIRE(refusal(whole).empty());
  refused(with(locator + 8, ~uint64_t{0}, 8), "not where its locator says");
  refused(with(locator + 8, record - 1, 8), "not where its locator says");
  refused(with(record + 4, 45, 8), "does not end at its locator");
  refused(with(record + 24, 2, 8), "end records disagree");
  refused(with(record + 40, 1, 8), "does not end at its end record");
  refused(with(record + 48, ~uint64_t{0}, 8), "does not end at its end record");
  refused(with(locator + 16, 2, 4), "several disks");
  refused(with(end + 10, 2, 2), "end records disagree");
  const std::size_t field = one + 46 + 5;
  refused(with(field + 2, 8, 2), "too short");
  refused(with(field + 2, 2000, 2), "longer than its record");
  refused(with(field, 7, 2), "ZIP64 field is needed");
  refused(with(field + 4, ~uint64_t{0}, 8), "two sizes differ");
  {
    std::string bytes = with(field + 4, ~uint64_t{0}, 8);
    put(bytes, field + 12, ~uint64_t{0}, 8);
    refused(bytes, "reaches outside the file");
  }
  refused(with(field + 20, ~uint64_t{0}, 8), "outside the file");
}
