// A warp of 32 lanes in step on the CPU: what device_warp.cuh is to a GPU. For tests only; speed is no aim.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "nformer/row_logic.cuh"

namespace nformer {

// IEEE half precision by its bits: g++ before 13 has no _Float16 in C++.
struct Half {
  uint16_t bits;

  explicit operator float() const {
    uint32_t const sign = static_cast<uint32_t>(bits & 0x8000U) << 16U;
    uint32_t const exponent = (bits >> 10U) & 31U, fraction = bits & 1023U;
    float magnitude = 0.0F;
    if (exponent == 0) {
      magnitude = std::ldexp(static_cast<float>(fraction), -24);
    } else if (exponent == 31) {
      magnitude = fraction == 0 ? kInfinity : __builtin_nanf("");
    } else {
      magnitude = std::ldexp(static_cast<float>(fraction + 1024U), static_cast<int>(exponent) - 25);
    }
    return sign != 0 ? -magnitude : magnitude;
  }

  // Rounds to nearest, ties to even, as __float2half_rn does.
  static Half from(float x) {
    uint16_t const sign = std::signbit(x) ? 0x8000U : 0U;
    float const magnitude = std::fabs(x);
    if (std::isnan(x)) {
      return {static_cast<uint16_t>(sign | 0x7fffU)};
    }
    if (magnitude >= 65520.0F) {
      return {static_cast<uint16_t>(sign | 0x7c00U)};
    }
    if (magnitude == 0.0F) {
      return {sign};
    }
    int exponent = 0;
    std::frexp(magnitude, &exponent);
    int const step = std::max(exponent - 11, -24);  // the weight of the last bit kept
    auto const kept = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, -step)));
    uint32_t const finite = step == -24 ? kept : kept + (static_cast<uint32_t>(step + 24) << 10U);
    return {static_cast<uint16_t>(sign | finite)};
  }
};

template <class X>
struct Lanes {
  std::array<X, kLanes> x;
};

template <class X, class Op>
auto each(Lanes<X> const& a, Lanes<X> const& b, Op op) {
  Lanes<decltype(op(a.x[0], b.x[0]))> out;
  for (int i = 0; i < kLanes; ++i) {
    out.x[i] = op(a.x[i], b.x[i]);
  }
  return out;
}

#define NFORMER_LANES_OPERATOR(op)                                    \
  template <class X>                                                  \
  auto operator op(Lanes<X> const& a, Lanes<X> const& b) {            \
    return each(a, b, [](X p, X q) { return static_cast<decltype(p op q)>(p op q); }); \
  }
NFORMER_LANES_OPERATOR(+)
NFORMER_LANES_OPERATOR(-)
NFORMER_LANES_OPERATOR(*)
NFORMER_LANES_OPERATOR(/)
NFORMER_LANES_OPERATOR(<)
NFORMER_LANES_OPERATOR(>)
NFORMER_LANES_OPERATOR(<=)
NFORMER_LANES_OPERATOR(>=)
NFORMER_LANES_OPERATOR(==)
#undef NFORMER_LANES_OPERATOR

inline Lanes<bool> operator|(Lanes<bool> const& a, Lanes<bool> const& b) {
  return each(a, b, [](bool p, bool q) { return p || q; });
}
inline Lanes<bool> operator&(Lanes<bool> const& a, Lanes<bool> const& b) {
  return each(a, b, [](bool p, bool q) { return p && q; });
}

struct HostWarp {
  using Float = Lanes<float>;
  using Int = Lanes<int32_t>;
  using Flag = Lanes<bool>;

  template <class X>
  static Lanes<X> splat(X x) {
    Lanes<X> out;
    out.x.fill(x);
    return out;
  }
  static Int lane() {
    Int out;
    for (int i = 0; i < kLanes; ++i) {
      out.x[i] = i;
    }
    return out;
  }
  static Flag none() { return splat(false); }
  static uint32_t ballot(Flag const& p) {
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) {
      bits |= static_cast<uint32_t>(p.x[i]) << i;
    }
    return bits;
  }
  static bool any(Flag const& p) { return ballot(p) != 0; }
  static Flag has_bit(uint32_t bits) {
    Flag out;
    for (int i = 0; i < kLanes; ++i) {
      out.x[i] = ((bits >> i) & 1U) != 0;
    }
    return out;
  }
  static int lowest_bit(uint32_t bits) { return __builtin_ctz(bits); }

  template <class X>
  static Lanes<X> select(Flag const& p, Lanes<X> const& yes, Lanes<X> const& no) {
    Lanes<X> out;
    for (int i = 0; i < kLanes; ++i) {
      out.x[i] = p.x[i] ? yes.x[i] : no.x[i];
    }
    return out;
  }
  template <class X>
  static X broadcast(Lanes<X> const& x, int from) {
    return x.x.at(static_cast<size_t>(from));
  }
  template <class X>
  static Lanes<X> shift_up(Lanes<X> const& x, X first) {
    Lanes<X> out;
    for (int i = 0; i < kLanes; ++i) {
      out.x[i] = i == 0 ? first : x.x[i - 1];
    }
    return out;
  }

  static Float fma(Float const& x, Float const& y, Float const& z) {
    Float out;
    for (int i = 0; i < kLanes; ++i) {
      out.x[i] = std::fmaf(x.x[i], y.x[i], z.x[i]);
    }
    return out;
  }
  static Float exp(Float x) {
    for (auto& e : x.x) {
      e = std::exp(e);
    }
    return x;
  }
  static Float absolute(Float x) {
    for (auto& e : x.x) {
      e = std::fabs(e);
    }
    return x;
  }
  static Float larger(Float const& x, Float const& y) {
    return each(x, y, [](float p, float q) { return std::fmax(p, q); });
  }

  template <class Op>
  static float butterfly(Float x, Op op) {
    for (int apart = kLanes / 2; apart > 0; apart /= 2) {
      Float const before = x;
      for (int i = 0; i < kLanes; ++i) {
        x.x[i] = op(before.x[i], before.x[i ^ apart]);
      }
    }
    return x.x[0];
  }
  static float max(Float const& x) {
    return butterfly(x, [](float p, float q) { return std::fmax(p, q); });
  }
  static float min(Float const& x) {
    return butterfly(x, [](float p, float q) { return std::fmin(p, q); });
  }
  static float sum(Float const& x) {
    return butterfly(x, [](float p, float q) { return p + q; });
  }

  static Float load(float const* from, Int const& at) {
    Float out;
    for (int i = 0; i < kLanes; ++i) {
      out.x[i] = from[at.x[i]];
    }
    return out;
  }
  static Int load(int32_t const* from, Int const& at, Flag const& mine, int32_t otherwise) {
    Int out;
    for (int i = 0; i < kLanes; ++i) {
      out.x[i] = mine.x[i] ? from[at.x[i]] : otherwise;
    }
    return out;
  }
  static void store(int32_t* to, Int const& at, Int const& x, Flag const& mine) {
    for (int i = 0; i < kLanes; ++i) {
      if (mine.x[i]) {
        to[at.x[i]] = x.x[i];
      }
    }
  }
  template <class T>
  static Float gather(T const* from, Int const& row, int stride, Flag const& mine) {
    Float out;
    for (int i = 0; i < kLanes; ++i) {
      out.x[i] = mine.x[i] ? static_cast<float>(from[int64_t{row.x[i]} * stride]) : 0.0F;
    }
    return out;
  }
  // With `words` a lane takes all of its four or none, as the aligned word on a GPU does.
  static bool inside(int32_t at, int e, int32_t size, bool words) { return words ? at < size : at + e < size; }
  template <class T>
  static void load_four(T const* from, Int const& at, int32_t size, bool words, Float (&x)[kSideBySide]) {
    for (int i = 0; i < kLanes; ++i) {
      for (int e = 0; e < kSideBySide; ++e) {
        if (inside(at.x[i], e, size, words)) {
          x[e].x[i] = static_cast<float>(from[at.x[i] + e]);
        }
      }
    }
  }
  static void put(float* to, float x) { *to = x; }
  static void put(Half* to, float x) { *to = Half::from(x); }
  template <class T>
  static void store_four(T* to, Int const& at, int32_t size, bool words, Float (&x)[kSideBySide]) {
    for (int i = 0; i < kLanes; ++i) {
      for (int e = 0; e < kSideBySide; ++e) {
        if (inside(at.x[i], e, size, words)) {
          put(to + at.x[i] + e, x[e].x[i]);
        }
      }
    }
  }
};

}  // namespace nformer
