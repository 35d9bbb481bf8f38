// Files as byte streams over libzstd's streaming decoder; see byte_source.h.
#include "data/byte_source.h"

#include <fmt/format.h>
#include <zstd.h>
#include <zstd_errors.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <limits>
#include <string_view>
#include <vector>

namespace longhand {
namespace {

struct FileCloser {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
struct DecoderFreer {
  void operator()(ZSTD_DCtx* decoder) const { ZSTD_freeDCtx(decoder); }
};

// The four bytes that a frame begins with; 0 where there are not so many.
uint32_t magic_number(std::string_view head) {
  uint32_t magic = 0;
  if (head.size() >= sizeof magic) std::memcpy(&magic, head.data(), sizeof magic);
  return magic;
}
bool starts_zstd(std::string_view head) {
  const uint32_t magic = magic_number(head);
  return magic == ZSTD_MAGICNUMBER || (magic & ZSTD_MAGIC_SKIPPABLE_MASK) == ZSTD_MAGIC_SKIPPABLE_START;
}

// The name of another compression whose first bytes these are, or "".
std::string_view other_compression(std::string_view head) {
  if (head.starts_with("\x1f\x8b")) return "gzip";
  if (head.starts_with("\xfd\x37\x7a\x58\x5a")) return "xz";
  if (head.starts_with("BZh")) return "bzip2";
  if (head.starts_with("PK\x03\x04")) return "zip";
  return "";
}

bool looks_like_text(std::string_view head) {
  return !head.empty() && std::none_of(head.begin(), head.end(), [](char c) {
    const auto byte = static_cast<unsigned char>(c);
    return byte < 0x20 && byte != '\t' && byte != '\n' && byte != '\r';
  });
}

std::string hex(std::string_view bytes) {
  std::string out;
  for (const char c : bytes) out += fmt::format("{}{:02x}", out.empty() ? "" : " ", static_cast<unsigned char>(c));
  return out;
}

// What a frame's header says of the window; RFC 8878, 3.1.1.1. The first byte of the window stands behind magic number and descriptor.
constexpr std::size_t kDescriptorAt = 4, kWindowAt = 5, kLongestHeader = 18;
constexpr unsigned kSingleSegment = 0x20;  // no window byte: the window is the frame's text, whose size is given
constexpr uint64_t window_of(char byte) {
  const auto bits = static_cast<unsigned char>(byte);
  return (uint64_t{1} << (10 + (bits >> 3))) / 8 * (8 + (bits & 7));
}
char largest_window_below(uint64_t bytes) {
  char byte = 0;
  while (window_of(static_cast<char>(byte + 1)) <= bytes) ++byte;
  return byte;
}

constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max() / 2;

constexpr const char* kFetchAgain = "copy or download the file again, then compare its checksum";

}  // namespace

struct ByteSource::State {
  std::string path;
  ByteSourceOptions options;
  std::unique_ptr<std::FILE, FileCloser> file;
  std::unique_ptr<ZSTD_DCtx, DecoderFreer> decoder;  // absent for plain text
  std::vector<char> stored;                          // bytes of the file not used yet: [used, filled)
  std::size_t used = 0, filled = 0;
  int64_t file_bytes = 0, read_bytes = 0, text_at = 0;
  int64_t frame = 0, frame_at = 0;  // number of the current frame from 1, and where it begins
  bool in_frame = false;
  int64_t frame_text = 0;  // what came out of the current frame, and how much may: less than its window where that was made smaller
  int64_t frame_may_give = kNoLimit;

  int64_t file_at() const { return read_bytes - static_cast<int64_t>(filled - used); }

  ErrorRow place_of_frame() const { return {"frame", fmt::format("{}, begins at stored byte {} of {}", frame, frame_at, file_bytes)}; }
  ErrorRow text_before() const { return {"text", fmt::format("{} bytes came out before", text_at)}; }
  [[noreturn]] void fail(const std::string& sentence, const std::string& reason, const std::string& way_out) const {
    std::vector<ErrorRow> rows{{"file", path}};
    if (frame > 0) {
      rows.push_back(place_of_frame());
      rows.push_back(text_before());
    } else {
      rows.push_back({"stored byte", fmt::format("{} of {}", file_at(), file_bytes)});
    }
    rows.push_back({"reason", reason});
    rows.push_back({"try", way_out});
    throw FileError("shard: " + sentence, std::move(rows));
  }

  int64_t may_hold() const {
    if (!decoder || file_bytes == 0) return kNoLimit;
    return std::max(kAlwaysHeld, kHeldPerStoredByte * file_bytes);
  }
  std::vector<ErrorRow> rows_of_may_hold() const {
    return {{"file", path},
            {"limit", fmt::format("{} bytes at once: {} for each of the file's {} bytes, at least {}", may_hold(), kHeldPerStoredByte,
                                  file_bytes, kAlwaysHeld)},
            {"try", "where the text is meant so: zstd -d < FILE > TEXT.jsonl, which is read whatever its size"}};
  }

  // Sees to `least` bytes that are not used yet, where the file has so many; false at its end.
  bool refill(std::size_t least = 1) {
    if (filled - used >= least) return true;
    std::memmove(stored.data(), stored.data() + used, filled - used);
    filled -= used;
    used = 0;
    const std::size_t got = std::fread(stored.data() + filled, 1, stored.size() - filled, file.get());
    filled += got;
    read_bytes += static_cast<int64_t>(got);
    if (got == 0 && std::ferror(file.get())) fail("the file cannot be read", std::strerror(errno), "check the disk");
    if (got == 0 && file_bytes > 0 && read_bytes != file_bytes)
      fail("the file changed while it was read", fmt::format("{} bytes when it was opened, {} were there", file_bytes, read_bytes),
           "put the whole file back; write new data under another name");
    return filled > used;
  }

  // The decoder takes memory for a whole window at once, also for a frame that never fills it. So it is told of a smaller one, where this
  // file may not hold so much: the same text comes out until there is more of it than that, and then no more is asked for.
  void begin_frame() {
    refill(kLongestHeader);
    in_frame = true;
    ++frame;
    frame_at = file_at();
    frame_text = 0;
    frame_may_give = kNoLimit;
    const std::string_view header(stored.data() + used, std::min(filled - used, kLongestHeader));
    if (magic_number(header) != ZSTD_MAGICNUMBER || header.size() <= kWindowAt) return;
    const auto held = static_cast<uint64_t>(may_hold()), most = uint64_t{1} << options.window_log;  // above that the decoder refuses
    if ((static_cast<unsigned char>(header[kDescriptorAt]) & kSingleSegment) != 0) {
      const uint64_t text = ZSTD_getFrameContentSize(header.data(), header.size());
      if (text > held && text <= most) refuse_frame();
      return;
    }
    char& window = stored[used + kWindowAt];
    if (const uint64_t asked = window_of(window); asked <= held || asked > most) return;
    window = largest_window_below(held);
    frame_may_give = static_cast<int64_t>(window_of(window)) - 2 * ZSTD_BLOCKSIZE_MAX;  // the decoder is up to a block ahead
  }
  [[noreturn]] void refuse_frame() const {
    std::vector<ErrorRow> rows = rows_of_may_hold();
    rows.insert(rows.begin() + 1, {place_of_frame(), text_before()});
    throw FileError(fmt::format("shard: frame {} unpacks to more than a file of this size may hold at once", frame), std::move(rows));
  }

  void open() {
    std::error_code error;
    const auto kind = std::filesystem::status(path, error);
    if (!std::filesystem::exists(kind))
      throw FileError("shard: no such file", {{"file", path}, {"try", "check the name and the folder it is looked up from"}});
    if (std::filesystem::is_directory(kind)) throw FileError("shard: a folder stands where a file is expected", {{"file", path}});
    file.reset(std::fopen(path.c_str(), "rb"));
    if (!file) throw FileError("shard: the file cannot be opened", {{"file", path}, {"reason", std::strerror(errno)}});
    if (std::filesystem::is_regular_file(kind)) file_bytes = static_cast<int64_t>(std::filesystem::file_size(path));
    stored.resize(ZSTD_DStreamInSize());
    refill();

    const std::string_view head(stored.data(), std::min<std::size_t>(filled, 64));
    const bool named_zstd = path.ends_with(".zst");
    if (starts_zstd(head)) {
      decoder.reset(ZSTD_createDCtx());
      ZSTD_DCtx_setParameter(decoder.get(), ZSTD_d_windowLogMax, options.window_log);
    } else if (const auto other = other_compression(head); !other.empty()) {
      fail(fmt::format("the file is {}, not zstd", other), "first bytes " + hex(head.substr(0, 4)),
           fmt::format("unpack it with {} and compress it with zstd", other));
    } else if (named_zstd && head.empty()) {
      fail("the file is empty", "a .zst file holds at least one frame of 9 bytes", kFetchAgain);
    } else if (named_zstd && looks_like_text(head)) {
      fail("the file is plain text under a .zst name", "it begins with: " + std::string(head.substr(0, 24)),
           "rename it to .jsonl, or compress it with zstd");
    } else if (named_zstd) {
      fail("the file is not zstd", "first bytes " + hex(head.substr(0, 4)) + ", a zstd frame begins with 28 b5 2f fd", kFetchAgain);
    }
  }

  std::size_t read_plain(char* out, std::size_t size) {
    if (!refill()) return 0;
    const std::size_t n = std::min(size, filled - used);
    std::memcpy(out, stored.data() + used, n);
    used += n;
    return n;
  }

  std::size_t read_zstd(char* out, std::size_t size) {
    ZSTD_outBuffer to{out, size, 0};
    while (to.pos == 0) {
      if (!refill()) {
        if (in_frame) fail("the file is truncated", fmt::format("it ends at stored byte {}, inside a zstd frame", file_at()), kFetchAgain);
        return 0;
      }
      if (!in_frame) begin_frame();
      to.size = static_cast<std::size_t>(std::min(static_cast<int64_t>(size), frame_may_give - frame_text + 1));
      ZSTD_inBuffer from{stored.data(), filled, used};
      const std::size_t left = ZSTD_decompressStream(decoder.get(), &to, &from);
      used = from.pos;
      if (ZSTD_isError(left)) refuse(left);
      in_frame = left != 0;
      frame_text += static_cast<int64_t>(to.pos);
      if (frame_text > frame_may_give) refuse_frame();
    }
    return to.pos;
  }

  [[noreturn]] void refuse(std::size_t code) {
    const std::string reason = ZSTD_getErrorName(code);
    switch (ZSTD_getErrorCode(code)) {
      case ZSTD_error_prefix_unknown:
        fail("bytes that begin no zstd frame follow the data",
             fmt::format("{} bytes from stored byte {} on", file_bytes - frame_at, frame_at),
             "the file was added to or joined wrongly: " + std::string(kFetchAgain));
      case ZSTD_error_checksum_wrong:
        fail("the checksum of a zstd frame does not match its content", "the file changed after it was written", kFetchAgain);
      case ZSTD_error_frameParameter_windowTooLarge:
        fail(fmt::format("the file asks for a window of more than {} MiB of memory", (int64_t{1} << options.window_log) >> 20), reason,
             fmt::format("compress it again with a smaller window: zstd -d --long=31 < FILE | zstd -19 --long={} > NEW",
                         options.window_log));
      case ZSTD_error_memory_allocation:
        fail("not enough memory for the file's window", reason, "free memory");
      default:
        fail("the compressed data are damaged", reason, kFetchAgain);
    }
  }
};

ByteSource::ByteSource(const std::string& path, ByteSourceOptions options) : state_(std::make_unique<State>()) {
  state_->path = path;
  state_->options = options;
  state_->open();
}
ByteSource::~ByteSource() = default;
ByteSource::ByteSource(ByteSource&&) noexcept = default;
ByteSource& ByteSource::operator=(ByteSource&&) noexcept = default;

std::size_t ByteSource::read(char* out, std::size_t size) {
  const std::size_t n = state_->decoder ? state_->read_zstd(out, size) : state_->read_plain(out, size);
  state_->text_at += static_cast<int64_t>(n);
  if (state_->options.held_whole && state_->text_at > may_hold())
    throw FileError("shard: the text is longer than a file of this size may hold", rows_of_may_hold());
  return n;
}

int64_t ByteSource::may_hold() const {
  return state_->may_hold();
}
std::vector<ErrorRow> ByteSource::rows_of_may_hold() const {
  return state_->rows_of_may_hold();
}
int64_t ByteSource::file_bytes() const {
  return state_->file_bytes;
}
int64_t ByteSource::file_at() const {
  return state_->file_at();
}
int64_t ByteSource::text_at() const {
  return state_->text_at;
}

}  // namespace longhand
