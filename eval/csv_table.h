// Tables of numbers in files: a fixed header, then rows of values between commas.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace longhand {

/// One line of a table. Its values are read by column, and a value that is not what it should be is an error that names file and line.
class CsvRow {
 public:
  std::size_t size() const { return values_.size(); }
  std::string_view text(std::size_t column) const { return values_[column]; }
  int64_t count(std::size_t column) const;  // a whole number of at least 0
  double number(std::size_t column) const;  // nan and inf too
  double finite(std::size_t column) const;
  [[noreturn]] void refuse(const std::string& reason) const;

 private:
  friend void read_csv(const std::string&, const std::vector<std::string>&, const std::function<void(const CsvRow&)>&);
  std::vector<std::string_view> values_;
  const std::string* path_ = nullptr;
  int64_t line_ = 0;
};

/// Calls `take` with each line behind the header, which must be one of `headers`; memory is one line. Empty lines are passed over.
/// errors   FileError naming file, line and reason: a file that cannot be read, another header, another number of values, no line at all
void read_csv(const std::string& path, const std::vector<std::string>& headers, const std::function<void(const CsvRow&)>& take);
inline void read_csv(const std::string& path, const char* header, const std::function<void(const CsvRow&)>& take) {
  read_csv(path, std::vector<std::string>{header}, take);
}

}  // namespace longhand
