"""The guided output of K branches, loaded and blended as in the fused step: shared by the kernels."""

import triton
import triton.language as tl


@triton.jit
def blend(
    output_ptr,
    offs,
    mask,
    weights_ptr,
    sample,
    batch,
    stride,
    momentum_ptrs,
    BRANCHES: tl.constexpr,
    BASE: tl.constexpr,
    UNCONDITIONAL: tl.constexpr,
    SCALED: tl.constexpr,
    MOMENTUM: tl.constexpr,
    place,
    places,
    BY_PLACE: tl.constexpr,
):
    """One sample's branches blended in float32 by its K weights, and the branch UNCONDITIONAL itself.

    BASE is the branch that differences are measured from, or -1 for the weighted sum; without an UNCONDITIONAL branch
    (-1) the second result is the first. SCALED weights the base too, MOMENTUM adds the tensor at `momentum_ptrs` with
    the weight after the branches'. BY_PLACE has `places` weights a branch, and `place` says which is an element's;
    where one is 1 and the others are 0, the delta form is that branch to the last bit.
    """
    if BASE < 0:
        for k in tl.static_range(BRANCHES):
            branch_ptr = output_ptr + (k * batch + sample).to(tl.int64) * stride
            m_k = tl.load(branch_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            if k == UNCONDITIONAL:
                unconditional = m_k
            if BRANCHES == 1:
                m = m_k
            elif BY_PLACE:
                w = tl.load(weights_ptr + k * places + place, mask=mask, other=0.0)
                m = w * m_k if k == 0 else tl.fma(w, m_k, m)
            elif k == 0:
                m = tl.load(weights_ptr) * m_k
            else:
                m = tl.fma(tl.load(weights_ptr + k) + tl.zeros_like(m_k), m_k, m)
    else:
        branch_ptr = output_ptr + (BASE * batch + sample).to(tl.int64) * stride
        base = tl.load(branch_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if BASE == UNCONDITIONAL:
            unconditional = base
        m = base
        if SCALED:
            m = tl.load(weights_ptr + BASE) * base
        for k in tl.static_range(BRANCHES):
            if k != BASE:
                branch_ptr = output_ptr + (k * batch + sample).to(tl.int64) * stride
                m_k = tl.load(branch_ptr + offs, mask=mask, other=0.0).to(tl.float32)
                if k == UNCONDITIONAL:
                    unconditional = m_k
                if not BY_PLACE:
                    m = tl.fma(tl.load(weights_ptr + k) + tl.zeros_like(m_k), m_k - base, m)
                else:
                    w = tl.load(weights_ptr + k * places + place, mask=mask, other=0.0)
                    m = tl.fma(w, m_k - base, m)
                    if k == (0 if BASE > 0 else 1):
                        exact = w == 1.0
                        alone = w == 0.0
                    else:
                        exact = (w == 1.0) & alone
                        alone = (w == 0.0) & alone
                    m = tl.where(exact, m_k, m)
    if MOMENTUM:
        h = tl.load(momentum_ptrs, mask=mask, other=0.0)
        m = tl.fma(tl.load(weights_ptr + BRANCHES) + tl.zeros_like(h), h, m)
    if UNCONDITIONAL < 0:
        unconditional = m
    return m, unconditional
