// The text of a file as a stream of bytes, decompressed on the way when it is zstd. Memory: one window and two small buffers.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace longhand {

struct ByteSourceOptions {
  int window_log = 27;  // the largest zstd window accepted: 2^27 bytes = 128 MiB, what decoders allow when nobody asks for more
};

/// Reads a zstd file (several frames, skippable frames) or plain text; told apart by their first bytes, not by their name. A file named
/// *.zst must be zstd.
/// errors   FileError with the file, the byte and the way out: missing file; gzip, xz, bzip2 or plain text under a .zst name; damaged,
///          truncated or trailing bytes; a file cut or added to since it was opened; a checksum that does not match; a window above
///          2^window_log
class ByteSource {
 public:
  explicit ByteSource(const std::string& path, ByteSourceOptions options = {});
  ~ByteSource();
  ByteSource(ByteSource&&) noexcept;
  ByteSource& operator=(ByteSource&&) noexcept;

  /// Up to `size` bytes into `out`; 0 only at the end of a sound file.
  std::size_t read(char* out, std::size_t size);

  int64_t file_bytes() const;  // size of the file as stored
  int64_t file_at() const;     // bytes of it used so far
  int64_t text_at() const;     // bytes of text handed out so far

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace longhand
