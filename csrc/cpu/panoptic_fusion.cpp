// CPU kernels of panoptic fusion. An instance costs what its box covers.
#include "../panoptic_fusion.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <unordered_map>
#include <vector>

namespace d2ext {
namespace {

using at::Tensor;

// ---------------------------------------------------------------- prune_masks

// Pixels of a box, and of them those where the mask is set.
struct Mask {
  Range columns;
  Range rows;
  std::vector<uint8_t> set;  // rows x columns
  int64_t area = 0;
};

template <typename T>
Mask paste(const T* logits, int32_t cells_y, int32_t cells_x, const WholeBox& box, int32_t height,
           int32_t width) {
  Mask mask;
  mask.columns = box.mask_columns(width);
  mask.rows = box.mask_rows(height);
  if (mask.columns.empty() || mask.rows.empty()) {
    return mask;
  }
  const T scale_x = static_cast<T>(cells_x) / static_cast<T>(box.width);
  const T scale_y = static_cast<T>(cells_y) / static_cast<T>(box.height);
  std::vector<Tap<T>> across(mask.columns.size());
  for (int32_t x = mask.columns.begin; x < mask.columns.end; ++x) {
    across[x - mask.columns.begin] = source_tap<T>(x - box.x, scale_x, cells_x);
  }
  mask.set.resize(static_cast<size_t>(mask.columns.size()) * mask.rows.size());
  uint8_t* out = mask.set.data();
  for (int32_t y = mask.rows.begin; y < mask.rows.end; ++y) {
    const Tap<T> down = source_tap<T>(y - box.y, scale_y, cells_y);
    for (const Tap<T>& x : across) {
      const bool set = interpolate<T>(logits, cells_x, down, x) > T(0);
      *out++ = set;
      mask.area += set;
    }
  }
  return mask;
}

template <typename T>
void prune_class(const std::vector<int64_t>& members, const int64_t* order, const Tensor& masks,
                 const Tensor& boxes, int32_t height, int32_t width, double overlap_fraction,
                 bool* keep) {
  const auto cells_y = static_cast<int32_t>(masks.size(1));
  const auto cells_x = static_cast<int32_t>(masks.size(2));
  std::vector<uint8_t> covered(static_cast<size_t>(height) * width);
  for (const int64_t position : members) {
    const int64_t i = order[position];
    const WholeBox box = whole_box(boxes.const_data_ptr<T>() + 4 * i);
    const Mask mask = paste(masks.const_data_ptr<T>() + i * cells_y * cells_x, cells_y, cells_x,
                            box, height, width);
    const int32_t columns = mask.columns.size();
    int64_t both = 0;
    const auto row_of = [&](int32_t y) {
      return covered.data() + static_cast<size_t>(y) * width + mask.columns.begin;
    };
    const uint8_t* set = mask.set.data();
    for (int32_t y = mask.rows.begin; mask.area > 0 && y < mask.rows.end; ++y, set += columns) {
      const uint8_t* row = row_of(y);
      for (int32_t x = 0; x < columns; ++x) {
        both += row[x] & set[x];
      }
    }
    keep[position] = mask.area > 0 &&
                     static_cast<double>(both) / static_cast<double>(mask.area) <= overlap_fraction;
    if (!keep[position]) {
      continue;
    }
    set = mask.set.data();
    for (int32_t y = mask.rows.begin; y < mask.rows.end; ++y, set += columns) {
      uint8_t* row = row_of(y);
      for (int32_t x = 0; x < columns; ++x) {
        row[x] |= set[x];
      }
    }
  }
}

std::tuple<Tensor, Tensor> prune_masks_cpu(const Tensor& masks, const Tensor& boxes,
                                           const Tensor& classes, const Tensor& scores,
                                           int64_t height, int64_t width, double overlap_fraction) {
  check_prune_inputs(masks, boxes, classes, scores, height, width);
  const auto type = at::toOpMathType(masks.scalar_type());
  const Tensor held_masks = masks.to(type).contiguous();
  const Tensor held_boxes = boxes.to(type).contiguous();
  const Tensor held_classes = classes.contiguous();
  const Tensor order =
      std::get<1>(scores.sort(/*stable=*/true, /*dim=*/0, /*descending=*/true)).contiguous();
  Tensor keep = at::empty({masks.size(0)}, masks.options().dtype(at::kBool));
  const int64_t* ranks = order.const_data_ptr<int64_t>();
  const int64_t* kinds = held_classes.const_data_ptr<int64_t>();
  std::unordered_map<int64_t, size_t> group_of;
  std::vector<std::vector<int64_t>> groups;
  for (int64_t position = 0; position < masks.size(0); ++position) {
    const auto [entry, added] = group_of.try_emplace(kinds[ranks[position]], groups.size());
    if (added) {
      groups.emplace_back();
    }
    groups[entry->second].push_back(position);
  }
  AT_DISPATCH_FLOATING_TYPES(type, "prune_masks_cpu", [&] {
    at::parallel_for(0, static_cast<int64_t>(groups.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        prune_class<scalar_t>(groups[g], ranks, held_masks, held_boxes,
                              static_cast<int32_t>(height), static_cast<int32_t>(width),
                              overlap_fraction, keep.mutable_data_ptr<bool>());
      }
    });
  });
  return {order, keep};
}

// ---------------------------------------------------------------- fuse_panoptic

template <typename T>
struct Instance {
  WholeBox box;
  const T* semantic;  // the class's logits; null: all of its logits are 0
  const T* mask;
  T scale_x;
  T scale_y;
};

template <typename T>
class Fusion {
 public:
  Fusion(const Tensor& score, const Tensor& boxes, const Tensor& classes, const Tensor& masks,
         int64_t height, int64_t width, int64_t num_stuff, bool unknown)
      : score_(score.const_data_ptr<T>()),
        channels_(static_cast<int32_t>(score.size(0))),
        grid_height_(static_cast<int32_t>(score.size(1))),
        grid_width_(static_cast<int32_t>(score.size(2))),
        cells_y_(static_cast<int32_t>(masks.size(1))),
        cells_x_(static_cast<int32_t>(masks.size(2))),
        height_(static_cast<int32_t>(height)),
        width_(static_cast<int32_t>(width)),
        stuff_(static_cast<int32_t>(num_stuff)),
        unknown_(unknown) {
    const int64_t plane = score.size(1) * score.size(2);
    const int64_t* kinds = classes.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < masks.size(0); ++i) {
      D2EXT_CHECK_INDEX(kinds[i] >= -1 && kinds[i] < channels_ - stuff_,
                        "fuse_panoptic: classes must be in 0..", channels_ - stuff_ - 1,
                        ", or -1, got ", kinds[i]);
      Instance<T> instance;
      instance.box = whole_box(boxes.const_data_ptr<T>() + 4 * i);
      instance.semantic = kinds[i] < 0 ? nullptr : score_ + (stuff_ + kinds[i]) * plane;
      instance.mask = masks.const_data_ptr<T>() + i * masks.size(1) * masks.size(2);
      instance.scale_x = static_cast<T>(cells_x_) / static_cast<T>(instance.box.width);
      instance.scale_y = static_cast<T>(cells_y_) / static_cast<T>(instance.box.height);
      instances_.push_back(instance);
    }
    across_.reserve(width_);
    const T scale = static_cast<T>(grid_width_) / static_cast<T>(width_);
    for (int32_t x = 0; x < width_; ++x) {
      across_.push_back(source_tap<T>(x, scale, grid_width_));
    }
  }

  void run(int32_t* labels, int32_t* semantic) const {
    const T scale = static_cast<T>(grid_height_) / static_cast<T>(height_);
    at::parallel_for(0, height_, 4, [&](int64_t begin, int64_t end) {
      Row row(width_, grid_width_);
      for (int64_t y = begin; y < end; ++y) {
        const Tap<T> down = source_tap<T>(static_cast<int32_t>(y), scale, grid_height_);
        row.labels = labels + y * width_;
        semantic_row(down, row, semantic + y * width_);
        for (int32_t i = 0; i < count(); ++i) {
          instance_row(i, static_cast<int32_t>(y), down, row);
        }
        finish(row);
      }
    });
  }

 private:
  // One line of the map.
  struct Row {
    Row(int32_t width, int32_t grid_width)
        : line(grid_width),
          best(width),
          thing(width),
          inside(width),
          covering(width),
          first_outside(width) {}

    std::vector<T> line;            // one channel
    std::vector<T> best;            // highest logit so far
    std::vector<T> thing;           // highest thing logit
    std::vector<T> inside;          // highest semantic view of the instances that cover the pixel
    std::vector<int32_t> covering;  // instances whose semantic view covers the pixel
    std::vector<int32_t> first_outside;  // lowest instance with neither view here: its logit is 0
    int32_t* labels = nullptr;
  };

  int32_t count() const { return static_cast<int32_t>(instances_.size()); }

  // One channel between the grid rows of `down`; pixels lie between its cells.
  void blend_rows(const T* grid, const Tap<T>& down, int32_t begin, int32_t end, T* line) const {
    const T* top = grid + static_cast<int64_t>(down.low) * grid_width_;
    const T* bottom = grid + static_cast<int64_t>(down.high) * grid_width_;
    for (int32_t x = begin; x < end; ++x) {
      line[x] = blend(down.low_weight, top[x], down.high_weight, bottom[x]);
    }
  }

  T at(const T* line, int32_t x) const {
    const Tap<T>& cells = across_[x];
    return blend(cells.low_weight, line[cells.low], cells.high_weight, line[cells.high]);
  }

  void semantic_row(const Tap<T>& down, Row& row, int32_t* semantic) const {
    const int64_t plane = static_cast<int64_t>(grid_height_) * grid_width_;
    constexpr T kLowest = -std::numeric_limits<T>::infinity();
    std::fill(row.best.begin(), row.best.end(), kLowest);
    std::fill(row.thing.begin(), row.thing.end(), kLowest);
    std::fill(row.inside.begin(), row.inside.end(), kLowest);
    std::fill(row.covering.begin(), row.covering.end(), 0);
    std::fill(row.first_outside.begin(), row.first_outside.end(), 0);
    std::fill_n(row.labels, width_, 0);
    std::fill_n(semantic, width_, stuff_);
    for (int32_t c = 0; c < channels_; ++c) {
      const T* grid = score_ + c * plane;
      const bool stuff = c < stuff_;
      T* best = stuff ? row.best.data() : row.thing.data();
      int32_t* label = stuff ? row.labels : semantic;
      blend_rows(grid, down, 0, grid_width_, row.line.data());
      for (int32_t x = 0; x < width_; ++x) {
        const T value = at(row.line.data(), x);
        if (value > best[x]) {
          best[x] = value;
          label[x] = c;
        }
      }
    }
    for (int32_t x = 0; x < width_; ++x) {
      semantic[x] = row.thing[x] > row.best[x] ? semantic[x] : row.labels[x];
    }
  }

  void instance_row(int32_t i, int32_t y, const Tap<T>& down, Row& row) const {
    const Instance<T>& instance = instances_[i];
    const WholeBox& box = instance.box;
    if (instance.semantic == nullptr) {
      return;
    }
    Range own;
    if (y >= box.y && y < box.semantic_bottom) {
      own = intersect({box.x, box.semantic_right}, {0, width_});
    }
    Range pasted;
    if (y >= box.y && y < box.y + box.height) {
      pasted = box.mask_columns(width_);
    }
    const Range both =
        own.empty()      ? pasted
        : pasted.empty() ? own
                         : Range{std::min(own.begin, pasted.begin), std::max(own.end, pasted.end)};
    if (!own.empty()) {
      blend_rows(instance.semantic, down, across_[own.begin].low, across_[own.end - 1].high + 1,
                 row.line.data());
    }
    const Tap<T> mask_down = source_tap<T>(y - box.y, instance.scale_y, cells_y_);
    for (int32_t x = both.begin; x < both.end; ++x) {
      T value = 0;
      if (own.contains(x)) {
        value = at(row.line.data(), x);
        row.inside[x] = std::max(row.inside[x], value);
        ++row.covering[x];
      }
      if (pasted.contains(x)) {
        value += interpolate<T>(instance.mask, cells_x_, mask_down,
                                source_tap<T>(x - box.x, instance.scale_x, cells_x_));
      }
      if (value > row.best[x]) {
        row.best[x] = value;
        row.labels[x] = stuff_ + i;
      }
      if (row.first_outside[x] == i) {
        row.first_outside[x] = i + 1;
      }
    }
  }

  void finish(Row& row) const {
    for (int32_t x = 0; x < width_; ++x) {
      if (row.first_outside[x] < count()) {
        const int32_t free = stuff_ + row.first_outside[x];
        if (row.best[x] < 0 || (row.best[x] == 0 && free < row.labels[x])) {
          row.best[x] = 0;
          row.labels[x] = free;
        }
      }
      if (unknown_) {
        T rest = row.thing[x];
        if (count() > 0) {
          const T inside =
              row.covering[x] < count() ? std::max(row.inside[x], T(0)) : row.inside[x];
          rest -= inside;
        }
        if (rest > row.best[x]) {
          row.labels[x] = stuff_ + count();
        }
      }
    }
  }

  const T* score_;
  int32_t channels_, grid_height_, grid_width_, cells_y_, cells_x_, height_, width_, stuff_;
  bool unknown_;
  std::vector<Instance<T>> instances_;
  std::vector<Tap<T>> across_;
};

std::tuple<Tensor, Tensor> fuse_panoptic_cpu(const Tensor& score, const Tensor& boxes,
                                             const Tensor& classes, const Tensor& masks,
                                             int64_t height, int64_t width, int64_t num_stuff,
                                             bool unknown) {
  check_fusion_inputs(score, boxes, classes, masks, height, width, num_stuff);
  const auto type = at::toOpMathType(score.scalar_type());
  const Tensor held_score = score.to(type).contiguous();
  const Tensor held_boxes = boxes.to(type).contiguous();
  const Tensor held_masks = masks.to(type).contiguous();
  const Tensor held_classes = classes.contiguous();
  Tensor labels = at::empty({height, width}, score.options().dtype(at::kInt));
  Tensor semantic = at::empty({height, width}, score.options().dtype(at::kInt));
  AT_DISPATCH_FLOATING_TYPES(type, "fuse_panoptic_cpu", [&] {
    Fusion<scalar_t>(held_score, held_boxes, held_classes, held_masks, height, width, num_stuff,
                     unknown)
        .run(labels.mutable_data_ptr<int32_t>(), semantic.mutable_data_ptr<int32_t>());
  });
  return {labels, semantic};
}

}  // namespace

TORCH_LIBRARY_IMPL(d2ext, CPU, m) {
  m.impl("prune_masks", prune_masks_cpu);
  m.impl("fuse_panoptic", fuse_panoptic_cpu);
}

}  // namespace d2ext
