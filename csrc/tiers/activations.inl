// Activations and their derivatives, written once over a tier's vectors. Included by kernels.inl.
//
// Accuracy: Exp is within 2 ulp of FP32 between -87.3 and 88.37 (Cody-Waite reduction, degree-6 polynomial); Erfc has a
// relative error below 1.2e-7 (W. H. Press et al., Numerical Recipes in C, 2nd ed., section 6.2) where its result is
// not denormal. NaN comes out as NaN.
#pragma once

namespace kt {

template <class Ops>
struct Math {
  using F = typename Ops::F;

  static F C(float value) { return Ops::Set(value); }

  static F Exp(F given) {
    // Operand order matters: x86 min and max return the second operand when either is NaN. From 88.38 on the result is
    // +inf.
    const F x = Ops::Min(C(89.0f), Ops::Max(C(-87.3f), given));
    const F n = Ops::Round(Ops::Mul(x, C(1.44269504f)));
    F r = Ops::Fma(n, C(-0.693359375f), x);
    r = Ops::Fma(n, C(2.12194440e-4f), r);
    // exp(r) on |r| <= ln(2)/2: 1 + r + r^2 * p(r), p the minimax polynomial of the Cephes library's expf.
    F p = C(1.9875691500e-4f);
    p = Ops::Fma(p, r, C(1.3981999507e-3f));
    p = Ops::Fma(p, r, C(8.3334519073e-3f));
    p = Ops::Fma(p, r, C(4.1665795894e-2f));
    p = Ops::Fma(p, r, C(1.6666665459e-1f));
    p = Ops::Fma(p, r, C(5.0000001201e-1f));
    const F value = Ops::Add(Ops::Fma(Ops::Mul(r, r), p, r), C(1.0f));
    // What is below the smallest normal number is zero.
    return Ops::SelectNegative(Ops::Add(given, C(87.3f)), Ops::Zero(), Ops::Mul(value, Ops::PowerOfTwo(n)));
  }

  static F Sigmoid(F x) { return Ops::Div(C(1.0f), Ops::Add(C(1.0f), Exp(Ops::Sub(C(0.0f), x)))); }

  // The complementary error function of z >= 0.
  static F ErfcPositive(F z) {
    const F t = Ops::Div(C(1.0f), Ops::Fma(C(0.5f), z, C(1.0f)));
    F p = C(0.17087277f);
    p = Ops::Fma(p, t, C(-0.82215223f));
    p = Ops::Fma(p, t, C(1.48851587f));
    p = Ops::Fma(p, t, C(-1.13520398f));
    p = Ops::Fma(p, t, C(0.27886807f));
    p = Ops::Fma(p, t, C(-0.18628806f));
    p = Ops::Fma(p, t, C(0.09678418f));
    p = Ops::Fma(p, t, C(0.37409196f));
    p = Ops::Fma(p, t, C(1.00002368f));
    p = Ops::Fma(p, t, C(-1.26551223f));
    return Ops::Mul(t, Exp(Ops::Sub(p, Ops::Mul(z, z))));
  }

  // The standard normal distribution function.
  static F NormalCdf(F x) {
    const F half_tail = Ops::Mul(C(0.5f), ErfcPositive(Ops::Mul(Ops::Abs(x), C(0.70710678f))));
    return Ops::SelectNegative(x, half_tail, Ops::Sub(C(1.0f), half_tail));
  }
};

// A unary activation sets its value and its derivative; unused results cost nothing after inlining.
template <class Ops>
struct Silu {
  using F = typename Ops::F;
  static void Evaluate(F x, F* value, F* derivative) {
    const F s = Math<Ops>::Sigmoid(x);
    *value = Ops::Mul(x, s);
    // s + x s (1 - s)
    *derivative = Ops::Fma(*value, Ops::Sub(Ops::Set(1.0f), s), s);
  }
};

template <class Ops>
struct Gelu {
  using F = typename Ops::F;
  static void Evaluate(F x, F* value, F* derivative) {
    const F cdf = Math<Ops>::NormalCdf(x);
    *value = Ops::Mul(x, cdf);
    const F density = Ops::Mul(Ops::Set(0.39894228f), Math<Ops>::Exp(Ops::Mul(Ops::Set(-0.5f), Ops::Mul(x, x))));
    *derivative = Ops::Fma(x, density, cdf);
  }
};

// 0.5 x (1 + tanh(v)) = x sigmoid(2v), v = sqrt(2/pi) (x + 0.044715 x^3).
template <class Ops>
struct GeluTanh {
  using F = typename Ops::F;
  static void Evaluate(F x, F* value, F* derivative) {
    const F square = Ops::Mul(x, x);
    const F twice_v = Ops::Mul(x, Ops::Fma(square, Ops::Set(0.07135481f), Ops::Set(1.59576912f)));
    const F twice_slope = Ops::Fma(square, Ops::Set(0.21406444f), Ops::Set(1.59576912f));
    const F s = Math<Ops>::Sigmoid(twice_v);
    *value = Ops::Mul(x, s);
    *derivative = Ops::Fma(Ops::Mul(*value, Ops::Sub(Ops::Set(1.0f), s)), twice_slope, s);
  }
};

template <class Ops>
struct Relu2 {
  using F = typename Ops::F;
  static void Evaluate(F x, F* value, F* derivative) {
    const F positive = Ops::Max(Ops::Set(0.0f), x);
    *value = Ops::Mul(positive, positive);
    *derivative = Ops::Add(positive, positive);
  }
};

// act = f(gate) * up
template <class Ops, template <class> class Unary>
struct Gated {
  using F = typename Ops::F;
  static F Forward(F gate, F up) {
    F value, derivative;
    Unary<Ops>::Evaluate(gate, &value, &derivative);
    return Ops::Mul(value, up);
  }
  static F Backward(F gate, F up, F d_act, F* d_gate, F* d_up) {
    F value, derivative;
    Unary<Ops>::Evaluate(gate, &value, &derivative);
    *d_gate = Ops::Mul(Ops::Mul(d_act, up), derivative);
    *d_up = Ops::Mul(d_act, value);
    return Ops::Mul(value, up);
  }
};

// act = f(up), no gate
template <class Ops, template <class> class Unary>
struct Ungated {
  using F = typename Ops::F;
  static F Forward(F, F up) {
    F value, derivative;
    Unary<Ops>::Evaluate(up, &value, &derivative);
    return value;
  }
  static F Backward(F, F up, F d_act, F* d_gate, F* d_up) {
    F value, derivative;
    Unary<Ops>::Evaluate(up, &value, &derivative);
    *d_gate = Ops::Set(0.0f);
    *d_up = Ops::Mul(d_act, derivative);
    return value;
  }
};

// gpt-oss: g = min(gate, 7), u = clamp(up, -7, 7), act = g sigmoid(1.702 g) (u + 1). The clamps pass no gradient beyond
// their limits.
template <class Ops>
struct SwigluOai {
  using F = typename Ops::F;
  static constexpr float kLimit = 7.0f, kAlpha = 1.702f;

  static F Forward(F gate, F up) {
    const F g = Ops::Min(Ops::Set(kLimit), gate);
    const F u = Ops::Min(Ops::Set(kLimit), Ops::Max(Ops::Set(-kLimit), up));
    const F s = Math<Ops>::Sigmoid(Ops::Mul(Ops::Set(kAlpha), g));
    return Ops::Mul(Ops::Mul(g, s), Ops::Add(u, Ops::Set(1.0f)));
  }
  static F Backward(F gate, F up, F d_act, F* d_gate, F* d_up) {
    const F limit = Ops::Set(kLimit), zero = Ops::Set(0.0f), one = Ops::Set(1.0f);
    const F g = Ops::Min(limit, gate);
    const F u = Ops::Min(limit, Ops::Max(Ops::Set(-kLimit), up));
    const F s = Ops::Div(one, Ops::Add(one, Math<Ops>::Exp(Ops::Mul(Ops::Set(-kAlpha), g))));
    const F glu = Ops::Mul(g, s), u1 = Ops::Add(u, one);
    // d(g s)/dg = s + alpha g s (1 - s)
    const F slope = Ops::Fma(Ops::Mul(Ops::Set(kAlpha), glu), Ops::Sub(one, s), s);
    *d_gate = Ops::SelectNegative(Ops::Sub(limit, gate), zero, Ops::Mul(Ops::Mul(d_act, u1), slope));
    *d_up = Ops::SelectNegative(Ops::Sub(limit, Ops::Abs(up)), zero, Ops::Mul(d_act, glu));
    return Ops::Mul(glu, u1);
  }
};

}  // namespace kt
