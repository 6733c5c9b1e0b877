// What the bindings share: PyTorch's tensors as pointers and element types, and its threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels/simd.h"

namespace memcompile {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements that a thread should have before another is worth its start.
inline constexpr int64_t kGrain = 1 << 14;

// f(begin, end) over parts of 0..count, each of which costs about `elements` elements.
template <class F>
void parallel(int64_t count, int64_t elements, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements));
  torch::stable::parallel_for(0, count, grain, f);
}

// f(T{}) for the type of the rows.
template <class F>
auto with_row_type(const Tensor& rows, const F& f) {
  switch (rows.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Half{});
    default:
      STD_TORCH_CHECK(false, "memcompile: rows must be float32, float64, bfloat16 or float16");
  }
}

inline bool is_floating(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

inline ScalarType sum_type(const Tensor& rows) {
  return rows.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The tensor, contiguous and of this type; itself where it is.
inline Tensor as(const Tensor& tensor, ScalarType type) {
  return torch::stable::contiguous(tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type));
}

// f(Slot{}) for the type of the slots.
template <class F>
auto with_slot_type(const Tensor& slots, const F& f) {
  const ScalarType type = slots.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, "memcompile: slots must be int32 or int64");
  return type == ScalarType::Int ? f(int32_t{}) : f(int64_t{});
}

// Whether these are the tensor's sizes, of which kAny may be any.
inline constexpr int64_t kAny = -1;
inline bool has_shape(const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  bool has = tensor.dim() == int64_t(sizes.size());
  for (int64_t i = 0; has && i < tensor.dim(); ++i) has = sizes.begin()[i] == kAny || sizes.begin()[i] == tensor.size(i);
  return has;
}

inline bool is(const Tensor& tensor, ScalarType type, std::initializer_list<int64_t> sizes) {
  return tensor.scalar_type() == type && has_shape(tensor, sizes);
}

inline void check_weights(const Tensor& slots, const Tensor& weights) {
  STD_TORCH_CHECK(slots.dim() == 2 && has_shape(weights, {slots.size(0), slots.size(1)}),
                  "memcompile: slots and weights must be [tokens, hits]");
  STD_TORCH_CHECK(is_floating(weights), "memcompile: weights must be floating point");
}

inline void check_dot(const Tensor& values, const Tensor& slots, const Tensor& grad) {
  STD_TORCH_CHECK(grad.scalar_type() == values.scalar_type(), "memcompile: grad must have the dtype of values");
  STD_TORCH_CHECK(values.dim() == 2 && slots.dim() == 2 && has_shape(grad, {slots.size(0), values.size(1)}),
                  "memcompile: slots must be [tokens, hits] and grad [tokens, value_dim]");
}

// `numbers` are of a table of `rows` rows.
template <class Number>
void check_range(const char* name, const Number* numbers, int64_t count, int64_t rows) {
  Number lowest = 0, highest = 0;
  for (int64_t i = 0; i < count; ++i) {
    lowest = std::min(lowest, numbers[i]);
    highest = std::max(highest, numbers[i]);
  }
  STD_TORCH_CHECK(count == 0 || (lowest >= 0 && int64_t(highest) < rows), "memcompile: ", name, " ",
                  int64_t(lowest < 0 ? lowest : highest), " is out of range for a table of ", rows, " rows");
}

// Asks for huge pages, as pages.py does, for a large tensor that was not written to yet: it is new memory in every call,
// and the faults of small pages take longer than what is written.
inline void advise_huge_pages(const Tensor& tensor) {
#if defined(__linux__)
  constexpr uintptr_t page = 1 << 21;
  const uintptr_t start = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t first = (start + page - 1) / page * page;
  const uintptr_t last = (start + uintptr_t(tensor.numel()) * tensor.element_size()) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace memcompile
