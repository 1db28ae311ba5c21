// The arithmetic of one row, shared by the kernels that hold a row in registers and those that stream it.
#pragma once
#include "align.h"
#include "device.h"

namespace compt {

constexpr float TINY_NORM = 1e-12f;   // rows of at most this length count as zero rows
constexpr float LAYER_EPS = 1e-5f;    // of layer normalisation, as in torch

// How a row is normalised: (x - mean) * scale.
struct Affine {
  float mean, scale;
  bool live;
};

// From the sum of squares around `mean`.
__device__ inline Affine affine_from(float mean, float squares, int64_t features, int norm, int distance) {
  if (norm == NORM_NONE && distance != COSINE) return {0.f, 1.f, true};
  const float length = sqrtf(squares);
  const bool live = !(length <= TINY_NORM);  // NaN stays live: a broken model must not look like an empty row
  if (norm == NORM_LAYER && distance != COSINE)
    return {mean, 1.f / sqrtf(squares / static_cast<float>(features) + LAYER_EPS), live};
  return {mean, 1.f / length, live};
}

// a * x - b * y; the products are not rounded before the difference is taken.
__device__ inline float exact_difference(float a, float x, float b, float y) {
  const float product = mul_rn(b, y);
  return fmaf(a, x, -product) - fmaf(b, y, -product);
}

// student - teacher, both normalised, of one feature; `offset` is offset_of the row. At a misfit of 1e-3, rounding the
// normalised features first would cost the loss 3e-6 and the gradient 6e-5.
__device__ inline float difference(float s, const Affine& as, float t, const Affine& at, float offset) {
  return exact_difference(s, as.scale, t, at.scale) - offset;
}

__device__ inline float offset_of(const Affine& as, const Affine& at) {
  return exact_difference(as.mean, as.scale, at.mean, at.scale);
}

// A feature's share of the loss and its derivative, both but for a constant factor (loss_factor, slope_factor).
template <bool SMOOTH> __device__ inline float share(float e, float beta, float& slope) {
  if constexpr (SMOOTH) {
    const float size = fabsf(e);
    if (size < beta) {
      slope = e / beta;
      return 0.5f * e * slope;
    }
    slope = e > 0.f ? 1.f : e < 0.f ? -1.f : e;  // 0 and NaN stay
    return size - 0.5f * beta;
  }
  slope = e;
  return e * e;
}

__device__ inline double loss_factor(int distance, int64_t features) {
  return distance == COSINE ? 0.5 : 1.0 / static_cast<double>(features);
}

__device__ inline double slope_factor(int distance, int64_t features) {
  return distance == COSINE ? 1.0 : (distance == MSE ? 2.0 : 1.0) / static_cast<double>(features);
}

// The derivative of the row through its normalisation: scale * (slope - slope_mean - x * slope_along).
struct Projection {
  float slope_mean, slope_along;
};

__device__ inline Projection projection(float along, float sum, int64_t features, int norm, int distance) {
  const float inverse = 1.f / static_cast<float>(features);
  const bool centred = norm == NORM_LAYER, unit = norm == NORM_L2 || distance == COSINE;
  return {centred ? sum * inverse : 0.f, unit ? along : centred ? along * inverse : 0.f};
}

}  // namespace compt
