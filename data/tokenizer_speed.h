// Measures how fast a tokenizer encodes on one core.
#pragma once
#include <span>
#include <string>

#include "data/tokenizer.h"

namespace longhand {

struct TokenizerSpeed {
  std::size_t text_bytes = 0;  // of one pass over the texts
  std::size_t tokens = 0;      // of one pass over the texts
  double cold_mb_per_s = 0;    // 10^6 bytes of text per second in the first pass
  double warm_mb_per_s = 0;    // in the fastest of the later passes
};

/// Encodes `texts` 1 + `warm_passes` times on the calling thread.
TokenizerSpeed measure_tokenizer(const Tokenizer& tokenizer, std::span<const std::string> texts, int warm_passes = 3);

}  // namespace longhand
