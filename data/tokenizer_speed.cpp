// Tokenizer speed; see tokenizer_speed.h.
#include "data/tokenizer_speed.h"

#include <algorithm>
#include <chrono>

namespace longhand {

TokenizerSpeed measure_tokenizer(const Tokenizer& tokenizer, std::span<const std::string> texts, int warm_passes) {
  TokenizerSpeed speed;
  for (const auto& text : texts) speed.text_bytes += text.size();
  std::vector<int32_t> ids;
  for (int pass = 0; pass <= warm_passes; ++pass) {
    speed.tokens = 0;
    const auto start = std::chrono::steady_clock::now();
    for (const auto& text : texts) {
      ids.clear();
      tokenizer.encode(text, ids);
      speed.tokens += ids.size();
    }
    const std::chrono::duration<double> elapsed_s = std::chrono::steady_clock::now() - start;
    const double mb_per_s = static_cast<double>(speed.text_bytes) / 1e6 / std::max(elapsed_s.count(), 1e-9);
    double& slot = pass == 0 ? speed.cold_mb_per_s : speed.warm_mb_per_s;
    slot = std::max(slot, mb_per_s);
  }
  return speed;
}

}  // namespace longhand
