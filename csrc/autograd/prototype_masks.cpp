// Gradient of assemble_masks, registered on the operator: so torch.autograd, torch.compile and
// export all see it. The boxes get no gradient.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace d2ext {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

Tensor call_forward(const Tensor& prototypes, const Tensor& coefficients, const Tensor& boxes,
                    const std::optional<Tensor>& batch_index, double padding) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("d2ext::assemble_masks", "")
                             .typed<Tensor(const Tensor&, const Tensor&, const Tensor&,
                                           const std::optional<Tensor>&, double)>();
  return op.call(prototypes, coefficients, boxes, batch_index, padding);
}

std::tuple<Tensor, Tensor> call_backward(const Tensor& grad, const Tensor& prototypes,
                                         const Tensor& coefficients, const Tensor& boxes,
                                         const std::optional<Tensor>& batch_index, double padding) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("d2ext::assemble_masks_backward", "")
          .typed<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                            const Tensor&, const std::optional<Tensor>&, double)>();
  return op.call(grad, prototypes, coefficients, boxes, batch_index, padding);
}

class AssembleMasks : public torch::autograd::Function<AssembleMasks> {
 public:
  static Variable forward(AutogradContext* ctx, const Variable& prototypes,
                          const Variable& coefficients, const Variable& boxes,
                          const std::optional<Variable>& batch_index, double padding) {
    at::AutoDispatchBelowADInplaceOrView guard;
    // The logits are computed again in backward, so only the inputs are kept.
    ctx->save_for_backward({prototypes, coefficients, boxes, batch_index.value_or(Tensor())});
    ctx->saved_data["padding"] = padding;
    return call_forward(prototypes, coefficients, boxes, batch_index, padding);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto batch_index =
        saved[3].defined() ? std::optional<Tensor>(saved[3]) : std::optional<Tensor>();
    auto [grad_prototypes, grad_coefficients] = call_backward(
        grads[0], saved[0], saved[1], saved[2], batch_index, ctx->saved_data["padding"].toDouble());
    return {grad_prototypes, grad_coefficients, Variable(), Variable(), Variable()};
  }
};

class AssembleMasksBackward : public torch::autograd::Function<AssembleMasksBackward> {
 public:
  static variable_list forward(AutogradContext* ctx, const Variable& grad,
                               const Variable& prototypes, const Variable& coefficients,
                               const Variable& boxes, const std::optional<Variable>& batch_index,
                               double padding) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [grad_prototypes, grad_coefficients] =
        call_backward(grad, prototypes, coefficients, boxes, batch_index, padding);
    return {grad_prototypes, grad_coefficients};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "assemble_masks: second derivatives are not implemented; use "
                                "d2ext.layers.assemble_masks_reference for them");
  }
};

Tensor assemble_masks_autograd(const Tensor& prototypes, const Tensor& coefficients,
                               const Tensor& boxes, const std::optional<Tensor>& batch_index,
                               double padding) {
  return AssembleMasks::apply(prototypes, coefficients, boxes, batch_index, padding);
}

std::tuple<Tensor, Tensor> assemble_masks_backward_autograd(
    const Tensor& grad, const Tensor& prototypes, const Tensor& coefficients, const Tensor& boxes,
    const std::optional<Tensor>& batch_index, double padding) {
  auto grads =
      AssembleMasksBackward::apply(grad, prototypes, coefficients, boxes, batch_index, padding);
  return {grads[0], grads[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(d2ext, Autograd, m) {
  m.impl("assemble_masks", assemble_masks_autograd);
  m.impl("assemble_masks_backward", assemble_masks_backward_autograd);
}

}  // namespace d2ext
