// See answer_metrics.h.
#include "eval/answer_metrics.h"

#include <algorithm>
#include <set>

namespace longhand {
namespace {

std::string without_leading_zeros(const std::string& digits) {
  return digits.substr(std::min(digits.find_first_not_of('0'), digits.size()));
}

std::string lower(std::string text) {
  for (char& c : text)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  return text;
}

bool holds(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

bool passkey_correct(const std::string& continuation, const std::string& key) {
  constexpr const char* kDigits = "0123456789";
  const auto begin = continuation.find_first_of(kDigits);
  if (begin == std::string::npos) return false;
  const auto end = continuation.find_first_not_of(kDigits, begin);
  return without_leading_zeros(continuation.substr(begin, end == std::string::npos ? end : end - begin)) == without_leading_zeros(key);
}

std::vector<std::string> babilong_parts(const std::string& target) {
  std::vector<std::string> parts{target};
  if (target.size() <= 3) return parts;
  for (auto comma = target.find(','); comma != std::string::npos; comma = parts.back().find(',')) {
    std::string rest = parts.back().substr(comma + 1);
    parts.back().resize(comma);
    parts.push_back(std::move(rest));
  }
  return parts;
}

bool babilong_correct(const std::string& output, const std::string& question, const std::string& target,
                      const std::vector<std::string>& labels) {
  std::string said = lower(output);
  for (const char* end : {".", "<context>", "<example>"}) said = said.substr(0, said.find(end));
  const std::string asked = lower(question);
  const std::vector<std::string> parts = babilong_parts(target);
  std::set<std::string> remain;
  for (const std::string& label : labels)
    if (const std::string word = lower(label); holds(said, word) && !holds(asked, word)) remain.insert(word);
  return remain.size() == parts.size() &&
         std::all_of(parts.begin(), parts.end(), [&](const std::string& part) { return remain.contains(lower(part)); });
}

}  // namespace longhand
