// Gradients of corner and center pooling, registered on the operators: so torch.autograd,
// torch.compile and export all see them. Only the inputs are kept; backward finds the maxima again.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <tuple>

namespace d2ext {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

template <typename Signature>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Tensor call_corner_pool(const Tensor& x, int64_t axis, bool reverse) {
  static const auto op = find_operator<Tensor(const Tensor&, int64_t, bool)>("d2ext::corner_pool");
  return op.call(x, axis, reverse);
}

Tensor call_corner_pool_backward(const Tensor& grad, const Tensor& x, int64_t axis, bool reverse) {
  static const auto op = find_operator<Tensor(const Tensor&, const Tensor&, int64_t, bool)>(
      "d2ext::corner_pool_backward");
  return op.call(grad, x, axis, reverse);
}

Tensor call_pair(const Tensor& vertical, const Tensor& horizontal, bool reverse) {
  static const auto op =
      find_operator<Tensor(const Tensor&, const Tensor&, bool)>("d2ext::corner_pool_pair");
  return op.call(vertical, horizontal, reverse);
}

std::tuple<Tensor, Tensor> call_pair_backward(const Tensor& grad, const Tensor& vertical,
                                              const Tensor& horizontal, bool reverse) {
  static const auto op =
      find_operator<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, bool)>(
          "d2ext::corner_pool_pair_backward");
  return op.call(grad, vertical, horizontal, reverse);
}

Tensor call_center(const Tensor& vertical, const Tensor& horizontal) {
  static const auto op = find_operator<Tensor(const Tensor&, const Tensor&)>("d2ext::center_pool");
  return op.call(vertical, horizontal);
}

std::tuple<Tensor, Tensor> call_center_backward(const Tensor& grad, const Tensor& vertical,
                                                const Tensor& horizontal) {
  static const auto op =
      find_operator<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&)>(
          "d2ext::center_pool_backward");
  return op.call(grad, vertical, horizontal);
}

// Without a gradient to record, building a node would only cost time.
template <typename... Tensors>
bool records(const Tensors&... tensors) {
  return torch::autograd::compute_requires_grad(tensors...) ||
         (torch::autograd::isFwGradDefined(tensors) || ...);
}

[[noreturn]] void no_second_derivatives(const char* name) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, name,
                              ": second derivatives are not implemented; use d2ext.layers.", name,
                              "_reference for them");
  __builtin_unreachable();
}

// ---------------------------------------------------------------- corner_pool

class CornerPool : public torch::autograd::Function<CornerPool> {
 public:
  static Variable forward(AutogradContext* ctx, const Variable& x, int64_t axis, bool reverse) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x});
    ctx->saved_data["axis"] = axis;
    ctx->saved_data["reverse"] = reverse;
    return call_corner_pool(x, axis, reverse);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    return {call_corner_pool_backward(grads[0], saved[0], ctx->saved_data["axis"].toInt(),
                                      ctx->saved_data["reverse"].toBool()),
            Variable(), Variable()};
  }
};

class CornerPoolBackward : public torch::autograd::Function<CornerPoolBackward> {
 public:
  static Variable forward(AutogradContext* ctx, const Variable& grad, const Variable& x,
                          int64_t axis, bool reverse) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_corner_pool_backward(grad, x, axis, reverse);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    no_second_derivatives("corner_pool");
  }
};

Tensor corner_pool_autograd(const Tensor& x, int64_t axis, bool reverse) {
  if (!records(x)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_corner_pool(x, axis, reverse);
  }
  return CornerPool::apply(x, axis, reverse);
}

Tensor corner_pool_backward_autograd(const Tensor& grad, const Tensor& x, int64_t axis,
                                     bool reverse) {
  return CornerPoolBackward::apply(grad, x, axis, reverse);
}

// ---------------------------------------------------------------- corner_pool_pair

class CornerPoolPair : public torch::autograd::Function<CornerPoolPair> {
 public:
  static Variable forward(AutogradContext* ctx, const Variable& vertical,
                          const Variable& horizontal, bool reverse) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({vertical, horizontal});
    ctx->saved_data["reverse"] = reverse;
    return call_pair(vertical, horizontal, reverse);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    auto [grad_vertical, grad_horizontal] =
        call_pair_backward(grads[0], saved[0], saved[1], ctx->saved_data["reverse"].toBool());
    return {grad_vertical, grad_horizontal, Variable()};
  }
};

class CornerPoolPairBackward : public torch::autograd::Function<CornerPoolPairBackward> {
 public:
  static variable_list forward(AutogradContext* ctx, const Variable& grad, const Variable& vertical,
                               const Variable& horizontal, bool reverse) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [grad_vertical, grad_horizontal] = call_pair_backward(grad, vertical, horizontal, reverse);
    return {grad_vertical, grad_horizontal};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    no_second_derivatives("corner_pool_pair");
  }
};

Tensor corner_pool_pair_autograd(const Tensor& vertical, const Tensor& horizontal, bool reverse) {
  if (!records(vertical, horizontal)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_pair(vertical, horizontal, reverse);
  }
  return CornerPoolPair::apply(vertical, horizontal, reverse);
}

std::tuple<Tensor, Tensor> corner_pool_pair_backward_autograd(const Tensor& grad,
                                                              const Tensor& vertical,
                                                              const Tensor& horizontal,
                                                              bool reverse) {
  auto grads = CornerPoolPairBackward::apply(grad, vertical, horizontal, reverse);
  return {grads[0], grads[1]};
}

// ---------------------------------------------------------------- center_pool

class CenterPool : public torch::autograd::Function<CenterPool> {
 public:
  static Variable forward(AutogradContext* ctx, const Variable& vertical,
                          const Variable& horizontal) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({vertical, horizontal});
    return call_center(vertical, horizontal);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    auto [grad_vertical, grad_horizontal] = call_center_backward(grads[0], saved[0], saved[1]);
    return {grad_vertical, grad_horizontal};
  }
};

class CenterPoolBackward : public torch::autograd::Function<CenterPoolBackward> {
 public:
  static variable_list forward(AutogradContext* ctx, const Variable& grad, const Variable& vertical,
                               const Variable& horizontal) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [grad_vertical, grad_horizontal] = call_center_backward(grad, vertical, horizontal);
    return {grad_vertical, grad_horizontal};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    no_second_derivatives("center_pool");
  }
};

Tensor center_pool_autograd(const Tensor& vertical, const Tensor& horizontal) {
  if (!records(vertical, horizontal)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_center(vertical, horizontal);
  }
  return CenterPool::apply(vertical, horizontal);
}

std::tuple<Tensor, Tensor> center_pool_backward_autograd(const Tensor& grad, const Tensor& vertical,
                                                         const Tensor& horizontal) {
  auto grads = CenterPoolBackward::apply(grad, vertical, horizontal);
  return {grads[0], grads[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(d2ext, Autograd, m) {
  m.impl("corner_pool", corner_pool_autograd);
  m.impl("corner_pool_backward", corner_pool_backward_autograd);
  m.impl("corner_pool_pair", corner_pool_pair_autograd);
  m.impl("corner_pool_pair_backward", corner_pool_pair_backward_autograd);
  m.impl("center_pool", center_pool_autograd);
  m.impl("center_pool_backward", center_pool_backward_autograd);
}

}  // namespace d2ext
