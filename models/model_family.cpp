// See model_family.h.
#include "models/model_family.h"

#include "core/error.h"

namespace longhand {

const ModelFamily& model_family(const std::string& name) {
  std::string known;
  for (const ModelFamily* family : model_families()) {
    if (name == family->name) return *family;
    known += (known.empty() ? "" : ", ") + std::string(family->name);
  }
  throw ConfigError("model: unknown family", {{"given", name}, {"known", known}});
}

}  // namespace longhand
