// How FLA (flash-linear-attention) writes GLA models.
#pragma once
#include "models/model_family.h"

namespace longhand::models::gla {
extern const std::span<const CheckpointLayout> kLayouts;

constexpr double kPublishedGateRank = 16, kPublishedGateNormalizer = 16;  // no key of FLA's config.json says otherwise
}  // namespace longhand::models::gla
