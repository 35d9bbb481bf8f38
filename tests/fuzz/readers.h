// Every reader of files that others wrote, in the form that a fuzzer wants: bytes in, and either they are read or an Error of longhand
// comes out. Beside each reader a few sound files, made by longhand's own writers, for a fuzzer to start from.
#pragma once
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace longhand::test {

struct Reader {
  const char* name;
  const char* file;  // the name that a file of this kind has
  /// Reads the file and looks at everything in it. An Error is an answer; any other exception, a crash or a broken promise is a finding.
  void (*read)(const std::string& path);
  /// Writes sound files of this kind into an empty folder.
  void (*write_samples)(const std::string& folder);
};

std::span<const Reader> readers();

/// Puts `bytes` into a file of the reader's kind below `folder` and reads it.
/// returns  the Error with which the reader refused them; nothing when it took them
/// errors   std::logic_error naming the promise that the reader broke; whatever else it throws
std::optional<std::string> read_bytes(const Reader& reader, const std::string& folder, std::string_view bytes);

/// The sound files of a reader, as bytes.
std::vector<std::string> samples_of(const Reader& reader, const std::string& folder);

}  // namespace longhand::test
