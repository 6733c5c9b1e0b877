// The CPU kernels of memcompile's operators, over PyTorch's stable ABI. What each computes is in the Python file of its
// operator; its arguments are checked in the headers beside this file; the loops, which know no PyTorch, are in kernels/.
#include "gather_bindings.h"
#include "pair_bindings.h"
#include "row_bindings.h"
#include "search_bindings.h"

namespace memcompile {

STABLE_TORCH_LIBRARY_IMPL(memcompile, CPU, m) {
  m.impl("product_key_search", TORCH_BOX(&product_key_search));
  m.impl("product_key_topk", TORCH_BOX(&product_key_topk));
  m.impl("prefetch_rows", TORCH_BOX(&prefetch_rows));
  m.impl("weighted_gather", TORCH_BOX(&weighted_gather));
  m.impl("gather_dot", TORCH_BOX(&gather_dot));
  m.impl("weighted_scatter", TORCH_BOX(&weighted_scatter));
  m.impl("row_sums", TORCH_BOX(&row_sums));
  m.impl("pair_gather", TORCH_BOX(&pair_gather));
  m.impl("pair_grads", TORCH_BOX(&pair_grads));
  m.impl("pair_scatter", TORCH_BOX(&pair_scatter));
  m.impl("skipped_steps", TORCH_BOX(&skipped_steps));
  m.impl("stale_gather", TORCH_BOX(&stale_gather));
  m.impl("stale_dot", TORCH_BOX(&stale_dot));
  m.impl("row_adam", TORCH_BOX(&row_adam));
  m.impl("row_adagrad", TORCH_BOX(&row_adagrad));
  m.impl("row_sgd", TORCH_BOX(&row_sgd));
}

}  // namespace memcompile
