// How transformers and state-spaces write Mamba-1 models.
#pragma once
#include "models/model_family.h"

namespace longhand::models::mamba1 {
extern const std::span<const CheckpointLayout> kLayouts;
}
