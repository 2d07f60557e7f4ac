"""The error budget: one rule for every kernel, every output and every gradient.

golden g: float64 arithmetic on the same rounded inputs. eager e: the same formula in PyTorch at the kernel's dtype.
actual k: the kernel. ulp is the spacing of the kernel's dtype.

finite  every value of k is finite.
max     max|k − g| ≤ κ·max|e − g| + slack    fp16, bf16: κ = 1 forward, 1.25 gradients and models, ½ ulp at max|g|
                                             fp32: κ = 2, 4 ulp at max|g|;  float64: 32 ulp at max|g| alone
rms     rms(k − g) ≤ κ'·rms(e − g) + slack'  fp16, bf16: κ' = 1, ¼ ulp at rms(g);  fp32: κ' = 2, 1 ulp at rms(g)
bias    |mean(sign(g)·(k − g))| ≤ (0.1 + 4/√n)·rms(k − g), or κ times eager's own, + 1/64 ulp; fp16 and bf16.
        n counts distinct values of k: elements rounded to one number share one error. Truncation gives 0.7, rounding 0.

A comparison that proves nothing is MISTRUSTED and fails: more zeros in g than declared, rms(g) = 0, something
non-finite in g or e, eager without any error in fp16 or bf16.

κ = 2 for fp32: the worst ratio of a prototype over 90 random attention problems was 2.01 (sums in another order);
everything else follows from "never worse than eager".
"""

import math
import os

import torch

KINDS = ("forward", "gradient", "model")


def ulp(dtype, value):
    """Spacing of the dtype's numbers just above |value|."""
    info = torch.finfo(dtype)
    exponent = math.frexp(max(abs(value), info.smallest_normal))[1] - 1
    return info.eps * 2.0**exponent


def _rms(x):
    return x.square().mean().sqrt().item()


def _repro(repro):
    if repro is None:
        test = os.environ.get("PYTEST_CURRENT_TEST", "").rsplit(" (", 1)[0]
        interpret = "TRITON_INTERPRET=1 " if os.environ.get("TRITON_INTERPRET") == "1" else ""
        repro = f"{interpret}pytest '{test}'"
    return " ".join(str(repro).split())


def assert_within_budget(
    actual, eager, golden, kind="forward", repro=None, expected_zeros=0.1, replicas=None, order=0.0
):
    """Fails unless ``actual`` keeps the budget that ``eager`` sets against ``golden`` (float64).

    Args:
        expected_zeros: share of exact zeros that golden may hold (ReLU: 0.7).
        repro: one line that names the case; without it the id of the running test is printed.
        replicas: pairs (eager, golden) of other draws of the same problem, for results of few elements. The rule max
            then holds the result to eager's largest error over all draws. The rule rms is widened by 1 + 4/√n, because
            the errors of few elements vary by chance; for the same reason the rule bias does not apply.
        order: how much a float32 result, or a gradient, may change with the order of sums, which CPU libraries choose
            freely; the rules max and rms add it to their slack.
    Returns:
        the two error ratios, kernel to eager, of max and rms.
    """
    __tracebackhide__ = True
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {KINDS}")
    dtype = actual.dtype
    line = _repro(repro)

    def fail(rule, text):
        raise AssertionError(f"{rule}: {text} [{kind}, {dtype}, shape {tuple(actual.shape)}]\nrepro: {line}")

    if golden.dtype != torch.float64:
        fail("MISTRUSTED", f"golden has dtype {golden.dtype}, expected float64")
    if eager.dtype != dtype:
        fail("MISTRUSTED", f"eager has dtype {eager.dtype}, expected {dtype} (as actual)")
    if not actual.shape == eager.shape == golden.shape:
        fail("shape", f"actual {tuple(actual.shape)}, eager {tuple(eager.shape)}, golden {tuple(golden.shape)}")
    k, e, g = (t.detach().to("cpu", torch.float64).flatten() for t in (actual, eager, golden))
    if g.numel() == 0:
        fail("MISTRUSTED", "nothing to compare")
    if not g.isfinite().all() or not e.isfinite().all():
        fail("MISTRUSTED", "golden or eager is not finite")
    zeros = (g == 0).double().mean().item()
    if zeros > expected_zeros or zeros == 1.0:
        fail("MISTRUSTED", f"{zeros:.1%} of golden are zeros, {expected_zeros:.1%} were declared")
    if not k.isfinite().all():
        fail("finite", f"{(~k.isfinite()).sum().item()} of {k.numel()} values are not finite")

    low = dtype in (torch.float16, torch.bfloat16)
    error, eager_error = k - g, e - g
    if replicas is not None:
        eager_error = torch.cat([eager_error, *((other - truth).flatten().double() for other, truth in replicas)])
    largest, worst, eager_worst = g.abs().max().item(), error.abs().max().item(), eager_error.abs().max().item()
    rms, eager_rms = _rms(error), _rms(eager_error)
    if low and eager_worst == 0 and g.numel() >= 8 and replicas is None:
        fail("MISTRUSTED", "eager has no error at all: compare bits instead")

    if dtype == torch.float64:
        factor, slack, rms_factor, rms_slack = 0.0, 32 * ulp(dtype, largest), 0.0, 32 * ulp(dtype, largest)
    elif dtype == torch.float32:
        factor, slack, rms_factor, rms_slack = 2.0, 4 * ulp(dtype, largest), 2.0, ulp(dtype, _rms(g))
        slack, rms_slack = slack + order, rms_slack + order
    else:
        factor, rms_factor = 1.0 if kind == "forward" else 1.25, 1.0
        slack, rms_slack = ulp(dtype, largest) / 2, ulp(dtype, _rms(g)) / 4
        if kind == "gradient":  # dP − delta may cancel to less than the rounding of its float32 sums
            slack, rms_slack = slack + order, rms_slack + order
    distinct = k.unique().numel()
    if replicas is not None:
        rms_factor *= 1 + 4 / math.sqrt(distinct)
    if not worst <= factor * eager_worst + slack:
        place = tuple(torch.unravel_index(error.abs().argmax(), actual.shape))
        place = tuple(int(i) for i in place)
        fail(
            "max",
            f"{worst:.4g} > {factor:g}·{eager_worst:.4g} (eager) + {slack:.4g}, at {place}: "
            f"{k[error.abs().argmax()].item():.8g}, golden {g[error.abs().argmax()].item():.8g}",
        )
    if not rms <= rms_factor * eager_rms + rms_slack:
        fail("rms", f"{rms:.4g} > {rms_factor:g}·{eager_rms:.4g} (eager) + {rms_slack:.4g}")
    if low and replicas is None:
        bias, eager_bias = (abs((g.sign() * difference).mean().item()) for difference in (error, eager_error))
        allowed = max((0.1 + 4 / math.sqrt(distinct)) * rms, factor * eager_bias) + rms_slack / 16
        if not bias <= allowed:
            fail("bias", f"{bias:.4g} > {allowed:.4g} (rms error {rms:.4g}, eager's bias {eager_bias:.4g})")
    return worst / max(eager_worst, 1e-300), rms / max(eager_rms, 1e-300)
