// What the strategies do to the rows of a state tensor, on each device. Whatever changes from step to step (which rows, their keys, the
// statistics) is read from tensors on the device, so that these launches can be part of a captured step.
#pragma once
#include <string>

#include "core/tensor.h"

namespace longhand {

/// Which elements of a state tensor's row share one mean and one standard deviation: element e, in row-major order from 0, is in group
/// (e / inner) % count.
struct StateGroups {
  int64_t count = 1, inner = 1;
};

/// The groups of tensor `name` with shape [B, ..] of a layer's state.
///   [B, H, ., .]      a group a head
///   other shapes      one group: a state without heads (Mamba-1's [B, d_inner, N]) and a convolution's window count as one head
/// by_channel  those without heads have a group a channel: axis 1 of a state, the last axis of a window
StateGroups state_groups(const std::string& name, const Shape& shape, bool by_channel);

/// t[b] = 0 where marks[b] == 0, in place, and everywhere where all[0] > 0.
/// marks  [B] i64 on t's device
/// all    [1] f64 there; undefined: as if it were 0
void clear_rows(const Tensor& t, const Tensor& marks, const Tensor& all = {});

/// Independent normal numbers in the rows that have a key, zeros in the others.
///   t[b, e] = keys[b] == 0 ? 0 : mean[g] + std[g] * philox_normal(philox_key(keys[b], tag), e)     g the group of e
/// t        [B, ..]          f32, bf16 (f64 on a CPU), contiguous; the sum in f32, rounded once
/// keys     [B] i64          with the seed, the step and the global row in them
/// tag                       tells tensors apart: hash_name("layers.3.ssm")
/// normals  [groups, 2] f32  mean and standard deviation
/// holds    an element depends on keys[b], tag and e alone, not on the batch around it
void draw_normals(const Tensor& t, const Tensor& keys, uint64_t tag, const Tensor& normals, const StateGroups& groups);

/// GPU against CPU, in units of std: the angle and the radius of Box-Muller (at most 6.7) each come from a few functions that are right to
/// 2 ulp, 8 * 2^-24 * 6.7 together.
inline constexpr double kNormalTolerance = 3.2e-6;

/// Of each row and group: how many elements, their mean and their squared deviations from it, in two passes in f64; all zeros where an
/// element is not finite.
/// t        [B, ..] f32, bf16 (f64 on a CPU), contiguous
/// moments  [B, all groups, 3] f64; groups `first` .. first + groups.count - 1 are written
void row_moments(const Tensor& t, const StateGroups& groups, const Tensor& moments, int64_t first);

/// Adds the rows of `moments` [B, groups, 3] to `running` [groups, 3], in order: however the rows are cut into calls, the bits are the
/// same.
void merge_rows(const Tensor& running, const Tensor& moments);

/// Begins a step: normals[g] = (mean, sqrt(m2 / count)) of running[g], then count and m2 are multiplied by `decay`.
/// running  [groups, 3] f64     normals  [groups, 2] f32
void refresh_normals(const Tensor& running, const Tensor& normals, double decay);

}  // namespace longhand
