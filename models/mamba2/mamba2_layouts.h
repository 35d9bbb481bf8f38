// How transformers and state-spaces write Mamba-2 models.
#pragma once
#include "models/model_family.h"

namespace longhand::models::mamba2 {
extern const std::span<const CheckpointLayout> kLayouts;
}
