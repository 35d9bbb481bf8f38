// See zip_archive.h.
#include "core/zip_archive.h"

#include <algorithm>
#include <cstring>

#include "core/crc32.h"
#include "core/error.h"
#include "core/plain_text.h"

namespace longhand {
namespace {

constexpr uint64_t kLocalHeader = 0x04034b50, kCentralHeader = 0x02014b50, kEnd = 0x06054b50, kEnd64 = 0x06064b50, kLocator64 = 0x07064b50;
constexpr uint64_t kLocalBytes = 30, kCentralBytes = 46, kEndBytes = 22, kEnd64Bytes = 56, kLocatorBytes = 20;
constexpr uint64_t kLongestComment = 0xFFFF, kUnset16 = 0xFFFF, kUnset32 = 0xFFFFFFFF;
constexpr uint64_t kEncrypted = 0x1 | 0x40 | 0x2000, kPatched = 0x20;  // flag bits
constexpr uint64_t kZip64Field = 0x0001;
constexpr uint64_t kMostEntries = 1'000'000;
constexpr uint64_t kAlignment = 64;

std::string hex(uint64_t value) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string out;
  for (int shift = 28; shift >= 0; shift -= 4) out += kDigits[(value >> shift) & 15];
  return "0x" + out;
}

void put(std::string& out, uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) out += static_cast<char>((value >> (8 * i)) & 0xFF);
}

}  // namespace

// --- reading --------------------------------------------------------------------------------------------------

ZipArchive::ZipArchive(const MappedFile& file) : file_(file) {
  if (file_.size() < 4 || number(0, 4) != kLocalHeader) refuse("does not begin with PK 3 4");
  const Directory directory = find_directory();
  std::vector<Span> spans;
  uint64_t at = directory.begin;
  for (uint64_t i = 0; i < directory.entries; ++i) at = read_entry(at, directory, spans);
  if (at != directory.begin + directory.size)
    refuse("the central directory is not as long as it says",
           {{"bytes", std::to_string(directory.size)}, {"its entries take", std::to_string(at - directory.begin)}});
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  for (std::size_t i = 1; i < spans.size(); ++i)
    if (spans[i].begin < spans[i - 1].end) refuse("two entries overlap", {{"entries", spans[i - 1].name + ", " + spans[i].name}});
}

void ZipArchive::refuse(const std::string& rule, std::vector<std::pair<std::string, std::string>> rows) const {
  std::vector<ErrorRow> all{{"file", file_.path()}};
  for (auto& [name, value] : rows) all.push_back({std::move(name), std::move(value)});
  throw FileError("zip: " + rule, std::move(all));
}

uint64_t ZipArchive::number(uint64_t at, int bytes) const {
  const auto count = static_cast<uint64_t>(bytes);
  if (at > file_.size() || file_.size() - at < count) refuse("a record reaches outside the file", {{"byte", std::to_string(at)}});
  uint64_t value = 0;
  for (uint64_t i = 0; i < count; ++i) value |= static_cast<uint64_t>(file_.bytes()[at + i]) << (8 * i);
  return value;
}

std::string_view ZipArchive::text(uint64_t at, uint64_t size) const {
  if (at > file_.size() || file_.size() - at < size) refuse("a record reaches outside the file", {{"byte", std::to_string(at)}});
  return {reinterpret_cast<const char*>(file_.bytes().data()) + at, size};
}

std::span<const std::byte> ZipArchive::bytes(const ZipEntry& entry) const {
  return file_.bytes().subspan(entry.begin, entry.size);
}

ZipArchive::Directory ZipArchive::find_directory() const {
  const uint64_t size = file_.size();
  uint64_t end = size;  // where the end record begins; its comment reaches to the end of the file
  for (uint64_t comment = 0; comment <= kLongestComment && size >= kEndBytes + comment; ++comment) {
    const uint64_t at = size - kEndBytes - comment;
    if (number(at, 4) != kEnd || number(at + 20, 2) != comment) continue;
    end = at;
    break;
  }
  if (end == size) refuse("no end-of-central-directory record: the file is cut off, or no zip archive", {{"bytes", std::to_string(size)}});
  Directory directory{number(end + 16, 4), number(end + 12, 4), number(end + 10, 2)};
  const uint64_t disk = number(end + 4, 2), directory_disk = number(end + 6, 2), entries_here = number(end + 8, 2);
  const bool needs64 = directory.begin == kUnset32 || directory.size == kUnset32 || directory.entries == kUnset16;
  const bool has64 = end >= kLocatorBytes && number(end - kLocatorBytes, 4) == kLocator64;
  if (needs64 && !has64) refuse("a ZIP64 record is needed and not there", {{"byte", std::to_string(end)}});
  uint64_t directory_end = end;
  if (has64) {
    const uint64_t locator = end - kLocatorBytes, at = number(locator + 8, 8);
    if (at > locator || locator - at < kEnd64Bytes || number(at, 4) != kEnd64)
      refuse("the ZIP64 record is not where its locator says", {{"byte", std::to_string(at)}});
    if (const uint64_t rest = number(at + 4, 8); rest != locator - at - 12)
      refuse("the ZIP64 record does not end at its locator", {{"byte", std::to_string(at)}, {"bytes", std::to_string(rest)}});
    const Directory wide{number(at + 48, 8), number(at + 40, 8), number(at + 32, 8)};
    if ((directory.begin != kUnset32 && directory.begin != wide.begin) || (directory.size != kUnset32 && directory.size != wide.size) ||
        (directory.entries != kUnset16 && directory.entries != wide.entries) || number(at + 24, 8) != wide.entries)
      refuse("the two end records disagree", {{"byte", std::to_string(at)}});
    if (number(at + 16, 4) != 0 || number(at + 20, 4) != 0 || number(locator + 4, 4) != 0 || number(locator + 16, 4) > 1)
      refuse("an archive of several disks");
    directory = wide;
    directory_end = at;
  }
  if ((disk != 0 && !(has64 && disk == kUnset16)) || (directory_disk != 0 && !(has64 && directory_disk == kUnset16)) ||
      (entries_here != number(end + 10, 2)))
    refuse("an archive of several disks");
  if (directory.begin > directory_end || directory_end - directory.begin != directory.size)
    refuse("the central directory does not end at its end record", {{"begins at", std::to_string(directory.begin)},
                                                                    {"bytes", std::to_string(directory.size)},
                                                                    {"end record at", std::to_string(directory_end)}});
  if (directory.entries > kMostEntries || directory.entries > directory.size / kCentralBytes)
    refuse("more entries than the central directory can hold", {{"entries", std::to_string(directory.entries)}});
  return directory;
}

void ZipArchive::require_name(std::string_view name) const {
  const auto bad = [&](const char* rule) { refuse(rule, {{"entry", printable(name)}}); };
  if (name.empty()) bad("an entry without a name");
  if (name.front() == '/') bad("an entry whose name begins with /");
  if (name.find('\\') != std::string_view::npos) bad("an entry with a backslash in its name");
  if (std::any_of(name.begin(), name.end(), [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; }))
    bad("an entry with a control character in its name");
  if (!is_utf8(name)) bad("an entry whose name is not UTF-8");
  for (std::size_t begin = 0; begin <= name.size();) {
    const auto end = std::min(name.find('/', begin), name.size());
    if (name.substr(begin, end - begin) == "..") bad("an entry whose name leads out of its folder");
    begin = end + 1;
  }
}

uint64_t ZipArchive::read_entry(uint64_t at, const Directory& directory, std::vector<Span>& spans) {
  const uint64_t directory_end = directory.begin + directory.size;
  if (directory_end - at < kCentralBytes || number(at, 4) != kCentralHeader)
    refuse("no entry where the central directory should have one", {{"byte", std::to_string(at)}});
  const uint64_t flags = number(at + 8, 2), method = number(at + 10, 2), crc = number(at + 16, 4);
  uint64_t packed = number(at + 20, 4), size = number(at + 24, 4), disk = number(at + 34, 2), header = number(at + 42, 4);
  const uint64_t name_bytes = number(at + 28, 2), extra_bytes = number(at + 30, 2), comment_bytes = number(at + 32, 2);
  const uint64_t next = at + kCentralBytes + name_bytes + extra_bytes + comment_bytes;
  if (next > directory_end) refuse("an entry reaches over the end of the central directory", {{"byte", std::to_string(at)}});
  const std::string_view name = text(at + kCentralBytes, name_bytes);
  require_name(name);
  const std::string shown(name);
  const auto bad = [&](const char* rule, std::vector<std::pair<std::string, std::string>> rows = {}) {
    rows.insert(rows.begin(), {"entry", printable(shown)});
    refuse(rule, std::move(rows));
  };

  // The ZIP64 field holds, in this order, those of the four numbers that are unset in the record.
  const bool wide = packed == kUnset32 || size == kUnset32 || header == kUnset32 || disk == kUnset16;
  bool seen = false;
  const uint64_t extra_end = at + kCentralBytes + name_bytes + extra_bytes;
  for (uint64_t field = at + kCentralBytes + name_bytes; field < extra_end;) {
    if (extra_end - field < 4) bad("an extra field that is cut off");
    const uint64_t id = number(field, 2), bytes = number(field + 2, 2), end = field + 4 + bytes;
    if (end > extra_end) bad("an extra field that is longer than its record");
    if (id == kZip64Field && wide) {
      if (seen) bad("two ZIP64 fields");
      seen = true;
      uint64_t place = field + 4;
      const auto take = [&](uint64_t& value, uint64_t unset, uint64_t width) {
        if (value != unset) return;
        if (end - place < width) bad("a ZIP64 field that is too short");
        value = number(place, static_cast<int>(width));
        place += width;
      };
      take(size, kUnset32, 8), take(packed, kUnset32, 8), take(header, kUnset32, 8), take(disk, kUnset16, 4);
    }
    field = end;
  }
  if (wide && !seen) bad("a ZIP64 field is needed and not there");

  if ((flags & kEncrypted) != 0) bad("an encrypted entry");
  if (method != 0 || (flags & kPatched) != 0)
    bad("a compressed entry", {{"method", std::to_string(method)}, {"expected", "0 (stored), as torch.save writes"}});
  if (disk != 0) bad("an archive of several disks");
  if (packed != size) bad("an entry whose two sizes differ", {{"stored", std::to_string(packed)}, {"real", std::to_string(size)}});
  if (header > directory.begin || directory.begin - header < kLocalBytes)
    bad("an entry that lies outside the file", {{"header at byte", std::to_string(header)}});
  if (number(header, 4) != kLocalHeader) bad("no local header where the central directory says", {{"byte", std::to_string(header)}});
  if ((number(header + 6, 2) & kEncrypted) != 0) bad("an encrypted entry");
  if (number(header + 8, 2) != 0) bad("a compressed entry", {{"method", std::to_string(number(header + 8, 2))}});
  const uint64_t local_name = number(header + 26, 2), begin = header + kLocalBytes + local_name + number(header + 28, 2);
  if (begin > directory.begin || directory.begin - begin < size)
    bad("an entry that reaches outside the file", {{"begins at", std::to_string(begin)}, {"bytes", std::to_string(size)}});
  if (text(header + kLocalBytes, local_name) != name)
    bad("an entry with two names", {{"local", printable(text(header + kLocalBytes, local_name))}});
  if (!entries_.emplace(shown, ZipEntry{begin, size, static_cast<uint32_t>(crc)}).second) bad("an entry that stands twice");
  spans.push_back({header, begin + size, shown});
  return next;
}

void ZipArchive::verify(const std::string& name) const {
  const ZipEntry& entry = entries_.at(name);
  if (entry.crc == 0) return;
  const auto data = bytes(entry);
  if (const uint32_t found = crc32(data.data(), data.size()); found != entry.crc)
    refuse("the data do not have their checksum",
           {{"entry", name}, {"CRC-32", hex(found)}, {"expected", hex(entry.crc)}, {"try", "fetch the file again: it is damaged"}});
}

// --- writing --------------------------------------------------------------------------------------------------

void ZipWriter::add(const std::string& name, const void* data, std::size_t bytes) {
  const auto header = static_cast<uint64_t>(out_.position());
  const Written entry{name, header, bytes, crc32(data, bytes)};
  const bool wide = entry.size >= zip64_from_;
  std::string extra;
  if (wide) {
    put(extra, kZip64Field, 2), put(extra, 16, 2);
    put(extra, entry.size, 8), put(extra, entry.size, 8);
  }
  const uint64_t before = header + kLocalBytes + name.size() + extra.size() + 4;
  const uint64_t padding = (kAlignment - before % kAlignment) % kAlignment;
  extra += "FB";
  put(extra, padding, 2);
  extra.append(padding, 'Z');
  std::string record;
  put(record, kLocalHeader, 4), put(record, wide ? 45 : 20, 2), put(record, 0x800, 2), put(record, 0, 2);  // version, UTF-8 names, stored
  put(record, 0, 2), put(record, 0x21, 2), put(record, entry.crc, 4);                                      // 1980-01-01 00:00
  put(record, wide ? kUnset32 : entry.size, 4), put(record, wide ? kUnset32 : entry.size, 4);
  put(record, name.size(), 2), put(record, extra.size(), 2);
  out_.write(record + name + extra);
  out_.write(data, bytes);
  written_.push_back(entry);
}

void ZipWriter::finish() {
  const auto begin = static_cast<uint64_t>(out_.position());
  for (const Written& entry : written_) {
    const bool wide_size = entry.size >= zip64_from_, wide_header = entry.header >= zip64_from_;
    std::string extra;
    if (wide_size || wide_header) {
      put(extra, kZip64Field, 2), put(extra, (wide_size ? 16 : 0) + (wide_header ? 8 : 0), 2);
      if (wide_size) put(extra, entry.size, 8), put(extra, entry.size, 8);
      if (wide_header) put(extra, entry.header, 8);
    }
    std::string record;
    const int version = extra.empty() ? 20 : 45;
    put(record, kCentralHeader, 4), put(record, static_cast<uint64_t>(version), 2), put(record, static_cast<uint64_t>(version), 2);
    put(record, 0x800, 2), put(record, 0, 2), put(record, 0, 2), put(record, 0x21, 2), put(record, entry.crc, 4);
    put(record, wide_size ? kUnset32 : entry.size, 4), put(record, wide_size ? kUnset32 : entry.size, 4);
    put(record, entry.name.size(), 2), put(record, extra.size(), 2), put(record, 0, 2);  // no comment
    put(record, 0, 2), put(record, 0, 2), put(record, 0, 4);                             // disk, attributes
    put(record, wide_header ? kUnset32 : entry.header, 4);
    out_.write(record + entry.name + extra);
  }
  const auto end = static_cast<uint64_t>(out_.position());
  const uint64_t size = end - begin, count = written_.size();
  const bool wide = begin >= zip64_from_ || size >= zip64_from_ || count >= std::min(zip64_from_, kUnset16);
  std::string record;
  if (wide) {
    put(record, kEnd64, 4), put(record, kEnd64Bytes - 12, 8), put(record, 45, 2), put(record, 45, 2), put(record, 0, 4), put(record, 0, 4);
    put(record, count, 8), put(record, count, 8), put(record, size, 8), put(record, begin, 8);
    put(record, kLocator64, 4), put(record, 0, 4), put(record, end, 8), put(record, 1, 4);
  }
  put(record, kEnd, 4), put(record, 0, 2), put(record, 0, 2);
  put(record, wide ? kUnset16 : count, 2), put(record, wide ? kUnset16 : count, 2);
  put(record, wide ? kUnset32 : size, 4), put(record, wide ? kUnset32 : begin, 4), put(record, 0, 2);
  out_.write(record);
}

}  // namespace longhand
