#pragma once
// The trilinear form sum_e <x[src(e)] * w[e], g[dst(e)]>: which element of a weight row goes with which feature.
#include <stdint.h>

#include "macros.h"

namespace geo {

constexpr int kMaxGroups = 8;

// The feature axes, merged where neighbours are alike: group k has `size[k]` features per step and is shared in w or not.
// Row-major; feature f of x goes with element weight_offset(f) of the weight row.
struct FeatureLayout {
  int64_t num_features = 1;  // of a row of x
  int64_t num_weights = 1;   // of a row of w
  int num_groups = 0;
  int64_t size[kMaxGroups] = {};
  int64_t stride[kMaxGroups] = {};  // in the weight row; 0 where shared

  // Append an axis (outermost first), then call finish(). False where there are too many groups.
  bool push(int64_t extent, bool shared) {
    if (extent == 1) return true;
    num_features *= extent;
    if (!shared) num_weights *= extent;
    if (num_groups && (stride[num_groups - 1] == 0) == shared) {
      size[num_groups - 1] *= extent;
      return true;
    }
    if (num_groups == kMaxGroups) return false;
    size[num_groups] = extent;
    stride[num_groups++] = shared ? 0 : 1;
    return true;
  }
  void finish() {
    int64_t step = 1;
    for (int k = num_groups - 1; k >= 0; --k) {
      if (stride[k] == 0) continue;
      stride[k] = step;
      step *= size[k];
    }
  }
};

GEO_HD int64_t weight_offset(const FeatureLayout& layout, int64_t feature) {
  int64_t offset = 0;
  for (int k = layout.num_groups - 1; k >= 0; --k) {
    offset += feature % layout.size[k] * layout.stride[k];
    feature /= layout.size[k];
  }
  return offset;
}

// The features that share weight j: number k of num_features / num_weights, in increasing order.
GEO_HD int64_t feature_of(const FeatureLayout& layout, int64_t weight, int64_t k) {
  int64_t feature = 0, step = 1;
  for (int g = layout.num_groups - 1; g >= 0; --g) {
    int64_t& from = layout.stride[g] ? weight : k;
    feature += from % layout.size[g] * step;
    from /= layout.size[g];
    step *= layout.size[g];
  }
  return feature;
}

}  // namespace geo
