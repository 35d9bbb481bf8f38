// The layer that a node of the tape belongs to, whatever runs around it.
#pragma once
#include <string>

namespace longhand {

/// Like LayerScope, with the whole path: LayerPath path("layers.3.mixer");
class LayerPath {
 public:
  explicit LayerPath(std::string path);
  ~LayerPath();
  LayerPath(const LayerPath&) = delete;
  LayerPath& operator=(const LayerPath&) = delete;

 private:
  std::string before_;
};

}  // namespace longhand
