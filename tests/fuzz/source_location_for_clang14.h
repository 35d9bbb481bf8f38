// std::source_location where the compiler has its parts but the library does not know (clang 14 with libstdc++); put before every file of
// the fuzzing build by -include.
#pragma once
#include <version>
#ifndef __cpp_lib_source_location
#include <cstdint>
namespace std {
class source_location {
 public:
  static constexpr source_location current(const char* file = __builtin_FILE(), uint_least32_t line = __builtin_LINE(),
                                           const char* function = __builtin_FUNCTION()) {
    source_location at;
    at.file_ = file, at.line_ = line, at.function_ = function;
    return at;
  }
  constexpr const char* file_name() const { return file_; }
  constexpr const char* function_name() const { return function_; }
  constexpr uint_least32_t line() const { return line_; }

 private:
  const char *file_ = "", *function_ = "";
  uint_least32_t line_ = 0;
};
}  // namespace std
#endif
