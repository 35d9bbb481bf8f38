// Files of tensors as torch.save writes them (.bin, .pt): a zip archive with a pickle of names and one entry of raw bytes for each storage.
// They are read as data; nothing in them is executed.
#pragma once
#include <map>
#include <string>

#include "core/named_tensors.h"

namespace longhand {

/// Which checksums are compared with the data while reading. A checksum of 0 counts as unset: torch has a switch that leaves them out.
enum class Checksums { none, index, all };  // index: of the names; all: of every storage too, which reads the whole file

/// The tensors of a state dict: F64, F32, F16 and BF16; a dict with the single key "state_dict" or "model" is taken off.
/// holds   a tensor that stands row-major in its storage is a view of the mapped file; two names on one storage are views of one storage
/// errors  FileError naming file, byte of the pickle and rule: not such an archive (legacy files of torch and tar files by name), those of
///         ZipArchive and read_pickle, byteorder "big", a version outside 1 to 10, entries in two folders; a storage that is missing, of
///         another size than its entry or named twice in two ways; a tensor that reaches outside its storage or has more elements than it;
///         another storage class (by name); copies of strided tensors that together would be larger than the file
/// source  torch/serialization.py, torch/_utils.py, caffe2/serialize/inline_container.cc
NamedTensors read_torch_file(const std::string& path, Checksums checksums = Checksums::index);

/// Writes a state dict that torch.load(path, weights_only=True) opens: an OrderedDict of floating tensors, each with its own dtype. Names
/// of the same memory, such as a head tied to the embedding, are stored once and share one storage when they are loaded. The file has
/// CRC-32 checksums, data at multiples of 64, and ZIP64 fields where sizes need them. errors  FileError; DtypeError naming a tensor that is
/// not floating; NumericError when a value does not fit options.stored_as; the file
///         appears only when it is whole
void write_torch_file(const std::string& path, const std::map<std::string, Tensor>& tensors, const TensorFileOptions& options = {});

}  // namespace longhand
