// The file and the bins of a loss-by-position curve.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace longhand {

struct PositionLoss;
struct PositionSpread;

/// Neighbouring positions put together.
struct PositionBin {
  int64_t first = 0, last = 0;  // positions, both included
  double tokens = 0;            // scored in the bin
  double loss = 0;              // nats, mean over these tokens

  double perplexity() const;  // exp(loss): the geometric mean of the positions' perplexities, weighted by their tokens
  double centre() const;      // geometric mean of first and last
};

/// The mean of consecutive bins. errors  ValueError for none
PositionBin merge(const std::vector<PositionBin>& bins);

/// One bin a position; positions that no sequence reaches are left out.
std::vector<PositionBin> position_bins(const PositionLoss& loss);

/// Joins bins into steps of 2^(1/per_octave): step k ends at the position floor(2^(k / per_octave)), so that powers of two are ends of
/// steps.
/// ends     further ends, such as the training length, so that no bin lies on both sides
/// first    positions up to this one are one bin
/// holds    the sums of tokens and of tokens * loss stay what they are
std::vector<PositionBin> octave_bins(const std::vector<PositionBin>& bins, int per_octave, const std::vector<int64_t>& ends = {},
                                     int64_t first = 1);

/// The ends of octave_bins(..., 1, ends) over so many positions: powers of two, `ends` and the last position, rising.
std::vector<int64_t> octave_ends(int64_t positions, const std::vector<int64_t>& ends = {});

/// "first,last,sequences,loss,standard_error", one line for each range that a sequence reached the end of.
std::string spread_csv(const PositionLoss& loss);
std::vector<PositionSpread> read_spread_csv(const std::string& path);

/// "position,tokens,loss,perplexity" and one line a position; tokens is the number of sequences that reach the position. With
/// bins_per_octave above 0 "first,last,tokens,loss,perplexity" and one line for each of octave_bins; tokens and loss are those of the bin.
std::string position_csv(const PositionLoss& loss, int bins_per_octave = 0);

/// The same into a file that appears only when whole.
void write_position_csv(const std::string& path, const PositionLoss& loss, int bins_per_octave = 0);

/// Reads such a file, of either kind, line by line and joins its positions by octave_bins, so that memory is that of the bins.
/// errors   FileError naming file, line and reason: another header, a value that is not a number, positions that do not rise
std::vector<PositionBin> read_position_csv(const std::string& path, int per_octave, const std::vector<int64_t>& ends = {});

}  // namespace longhand
