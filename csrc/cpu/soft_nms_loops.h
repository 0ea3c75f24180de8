// Inner loops of soft-NMS, over the boxes left. Included by each_target.h, once for each
// instruction set.

// IoUs of box `best` with boxes [begin, end), the factors of their scores, and the scores times
// these. Returns whether one that overlaps falls below the threshold.
D2EXT_TARGET bool weigh(const RoundArrays& in, int64_t best, int64_t begin, int64_t end,
                        const Settings& settings) {
  using V = Simd<float>::Vector;
  using M = Simd<float>::Mask;
  constexpr int kLanes = Simd<float>::kLanes;
  const float area = (in.x2[best] - in.x1[best] + 1) * (in.y2[best] - in.y1[best] + 1);
  const V best_x1 = V{} + in.x1[best];
  const V best_y1 = V{} + in.y1[best];
  const V best_x2 = V{} + in.x2[best];
  const V best_y2 = V{} + in.y2[best];
  M any = {};
  for (int64_t i = begin; i < end; i += kLanes) {
    V x1;
    V y1;
    V x2;
    V y2;
    V score;
    load(x1, in.x1 + i);
    load(y1, in.y1 + i);
    load(x2, in.x2 + i);
    load(y2, in.y2 + i);
    load(score, in.scores + i);
    const V width = (x2 < best_x2 ? x2 : best_x2) - (x1 > best_x1 ? x1 : best_x1) + 1.0f;
    const V height = (y2 < best_y2 ? y2 : best_y2) - (y1 > best_y1 ? y1 : best_y1) + 1.0f;
    const V common = width * height;
    const V united = area + (x2 - x1 + 1.0f) * (y2 - y1 + 1.0f) - common;
    const M touching = (width > 0.0f) & (height > 0.0f);
    const V overlap = touching ? common / united : V{};
    V weight = V{} + 1.0f;
    if (settings.method == Method::kGaussian) {
      V exponent = -(overlap * overlap) / settings.sigma;
      exponential(exponent);
      weight = touching ? exponent : weight;
    } else {
      const V reduced = settings.method == Method::kLinear ? 1.0f - overlap : V{};
      weight = overlap > settings.iou_threshold ? reduced : weight;
    }
    const V weighed = score * weight;
    // Past the end there is padding.
    M lane;
    for (int k = 0; k < kLanes; ++k) {
      lane[k] = k;
    }
    const M inside = lane < static_cast<int32_t>(std::min<int64_t>(end - i, kLanes));
    any |= touching & (weighed < settings.score_threshold) & inside;
    store(in.overlaps + i, overlap);
    store(in.weights + i, weight);
    store(in.weighed + i, weighed);
  }
  bool dropped = false;
  for (int k = 0; k < kLanes; ++k) {
    dropped = dropped || any[k] != 0;
  }
  return dropped;
}

// The first of the greatest; NaN is the greatest.
D2EXT_TARGET int64_t first_maximum(const float* values, int64_t begin, int64_t end) {
  using V = Simd<float>::Vector;
  constexpr int kLanes = Simd<float>::kLanes;
  float greatest = values[begin];
  int64_t i = begin;
  if (i + kLanes <= end) {
    V running;
    load(running, values + i);
    for (i += kLanes; i + kLanes <= end; i += kLanes) {
      V value;
      load(value, values + i);
      running = (value > running) | (value != value) ? value : running;
    }
    for (int k = 0; k < kLanes; ++k) {
      const float value = running[k];
      greatest = value > greatest || value != value ? value : greatest;
    }
  }
  for (; i < end; ++i) {
    greatest = values[i] > greatest || values[i] != values[i] ? values[i] : greatest;
  }
  int64_t place = begin;
  while (!(values[place] == greatest || (values[place] != values[place] && greatest != greatest))) {
    ++place;
  }
  return place;
}

inline RoundKernels round_kernels() { return {weigh, first_maximum}; }
