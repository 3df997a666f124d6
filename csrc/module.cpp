// Bodies for the operators that Python defines, through torch's stable C++ interface.
#include "ops.h"

#define MINEXP_REGISTER(m, device)                                                            \
  m.impl("activation_kl", TORCH_BOX(&minexp::activation_kl_##device));                        \
  m.impl("activation_kl_backward", TORCH_BOX(&minexp::activation_kl_backward_##device));      \
  m.impl("edge_topk", TORCH_BOX(&minexp::edge_topk_##device));                                \
  m.impl("edge_threshold", TORCH_BOX(&minexp::edge_threshold_##device));                      \
  m.impl("edge_select", TORCH_BOX(&minexp::edge_select_##device));                            \
  m.impl("edge_position_topk", TORCH_BOX(&minexp::edge_position_topk_##device));

STABLE_TORCH_LIBRARY_IMPL(minexp, CPU, m) {
  MINEXP_REGISTER(m, cpu)
  m.impl("activation_kl_gradients", TORCH_BOX(&minexp::activation_kl_gradients_cpu));
}

#if defined(MINEXP_CUDA)
STABLE_TORCH_LIBRARY_IMPL(minexp, CUDA, m) { MINEXP_REGISTER(m, cuda) }
#endif

#if !defined(MINEXP_CUDA_ARCHITECTURES)
#define MINEXP_CUDA_ARCHITECTURES ""
#endif
extern "C"
#if defined(__GNUC__)
    __attribute__((visibility("default")))
#endif
    const char* minexp_cuda_architectures() {  // read through ctypes by minexp/_extension.py
  return MINEXP_CUDA_ARCHITECTURES;
}
