// The text of a file as a stream of bytes, decompressed on the way when it is zstd. Memory: one window and two small buffers. The window
// follows the size of the file, see may_hold().
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/error.h"

namespace longhand {

/// What a zstd file may ask for: 4 bytes of it can stand for 128 KiB of text, and 6 for a window of any size. Text is compressed to a third
/// or a tenth, and a shard of 4 MiB has the general limits alone.
constexpr int64_t kHeldPerStoredByte = 64, kAlwaysHeld = int64_t{8} << 20;

struct ByteSourceOptions {
  int window_log = 27;      // the largest zstd window accepted: 2^27 bytes = 128 MiB, what decoders allow when nobody asks for more
  bool held_whole = false;  // whoever reads keeps all of the text: then it may have no more than may_hold() bytes
};

/// Reads a zstd file (several frames, skippable frames) or plain text; told apart by their first bytes, not by their name. A file named
/// *.zst must be zstd.
/// errors   FileError with the file, the byte and the way out: missing file; gzip, xz, bzip2 or plain text under a .zst name; damaged,
///          truncated or trailing bytes; a file cut or added to since it was opened; a checksum that does not match; a window above
///          2^window_log; a frame that fills a window of more than may_hold() bytes
class ByteSource {
 public:
  explicit ByteSource(const std::string& path, ByteSourceOptions options = {});
  ~ByteSource();
  ByteSource(ByteSource&&) noexcept;
  ByteSource& operator=(ByteSource&&) noexcept;

  /// Up to `size` bytes into `out`; 0 only at the end of a sound file.
  std::size_t read(char* out, std::size_t size);

  /// The most text of this file that may be held at once, in a window or as a line: kHeldPerStoredByte for each stored byte, and
  /// kAlwaysHeld for the smallest file. No limit for plain text, which is as large as its file, and for a pipe.
  int64_t may_hold() const;
  /// The rows of an error that say so, and the way out.
  std::vector<ErrorRow> rows_of_may_hold() const;

  int64_t file_bytes() const;  // size of the file as stored
  int64_t file_at() const;     // bytes of it used so far
  int64_t text_at() const;     // bytes of text handed out so far

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace longhand
