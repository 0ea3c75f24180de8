// Error messages without iostreams. A toolchain that links the C++ library statically gives this
// extension streams of its own, whose locale is not PyTorch's: writing a number to one crashes.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <string>

namespace d2ext {
namespace message {

inline std::string text(const char* value) { return value; }
inline std::string text(const std::string& value) { return value; }
inline std::string text(int32_t value) { return std::to_string(value); }
inline std::string text(int64_t value) { return std::to_string(value); }
inline std::string text(double value) { return std::to_string(value); }
inline std::string text(c10::ScalarType value) { return c10::toString(value); }
inline std::string text(const c10::Device& value) { return value.str(); }
inline std::string text(at::IntArrayRef sizes) {
  std::string result = "[";
  for (size_t i = 0; i < sizes.size(); ++i) {
    result += (i == 0 ? "" : ", ") + std::to_string(sizes[i]);
  }
  return result + "]";
}

}  // namespace message

// The arguments one after the other.
template <typename... Args>
std::string join(const Args&... args) {
  return (std::string() + ... + message::text(args));
}

}  // namespace d2ext

// As PyTorch's macros, for arguments of the kinds above.
#define D2EXT_CHECK_VALUE(condition, ...) TORCH_CHECK_VALUE(condition, ::d2ext::join(__VA_ARGS__))
#define D2EXT_CHECK_INDEX(condition, ...) TORCH_CHECK_INDEX(condition, ::d2ext::join(__VA_ARGS__))
