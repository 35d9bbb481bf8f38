// Errors with structure: what happened, where, what to do.
// The first line is "<op>: plain sentence"; rows follow as aligned "name  value" pairs; `at` is the caller, `try` the way out.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace longhand {

/// One row of an error message, for example {"expected", "weight [1024]"}.
struct ErrorRow {
  std::string name, value;
};

/// Base of every error that longhand throws. what() is the whole message; rows() gives the parts.
class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& sentence, std::vector<ErrorRow> rows = {},
                 const std::source_location& at = std::source_location::current());
  const std::vector<ErrorRow>& rows() const { return rows_; }

 private:
  std::vector<ErrorRow> rows_;
};

// One type per kind of mistake.
enum class Mistake { shape, dtype, value, numeric, device, memory, file, config };

template <Mistake kind>
class ErrorOf : public Error {
 public:
  explicit ErrorOf(const std::string& sentence, std::vector<ErrorRow> rows = {},
                   const std::source_location& at = std::source_location::current())
      : Error(sentence, std::move(rows), at) {}
};

using ShapeError = ErrorOf<Mistake::shape>;      // tensors whose sizes do not fit together
using DtypeError = ErrorOf<Mistake::dtype>;      // an element type the op does not take
using ValueError = ErrorOf<Mistake::value>;      // an argument outside its range
using NumericError = ErrorOf<Mistake::numeric>;  // NaN or infinity where a number must be
using DeviceError = ErrorOf<Mistake::device>;    // a missing device, a failed CUDA call, tensors on different devices
using MemoryError = ErrorOf<Mistake::memory>;    // an allocation that does not fit
using FileError = ErrorOf<Mistake::file>;        // a file that is missing, damaged or not what it claims
using ConfigError = ErrorOf<Mistake::config>;    // a recipe, configuration or command line that cannot be followed

}  // namespace longhand
