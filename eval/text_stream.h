// Text from tokens as it becomes certain: whole characters only, and nothing that a stop string might still take back.
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace longhand {

/// Takes the bytes of one token after the other and gives out valid UTF-8. Held back are the beginning of a character whose rest is to
/// come, and text with which a stop string may begin; bytes that can never be part of a character become U+FFFD.
class TextStream {
 public:
  /// stops    texts that end the stream; none of them empty
  /// held     what another stream held back: this one goes on where it stopped. Where a stop string stands in it, this one has stopped
  ///          already, and finish() gives the text before it
  /// errors   ValueError for an empty stop string
  explicit TextStream(std::vector<std::string> stops = {}, std::string held = {});

  /// The text that is certain after `bytes`. When a stop string appears, the text before it (of several, the one that is complete first; of
  /// those the longest), and stopped() turns true: the stop string and what follows it are dropped.
  std::string push(std::string_view bytes);
  bool stopped() const { return stopped_; }

  const std::string& held() const { return held_; }
  /// What was held back, as text: nothing more will come.
  std::string finish();

 private:
  void cut_at_stop(std::size_t searched);
  std::size_t certain() const;  // bytes of held_ that can be given out

  std::vector<std::string> stops_;
  std::string held_;
  bool stopped_ = false;
};

}  // namespace longhand
