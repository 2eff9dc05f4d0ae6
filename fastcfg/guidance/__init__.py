"""Guidance as per-sample weights over branches, one branch per conditioning.

A guidance spec says which branches the model runs, in which order along the batch, and how each row blends them:

    delta form (base = b):     m = m_b + sum over k != b of w_k (m_k - m_b)
    sum form (base = None):    m = sum over k of w_k m_k

Guidance that uses the outputs computes the weights of a row from their Gram matrix (`GramGuidance`), and weights the
base and a momentum as well: m = w_b m_b + sum of w_k (m_k - m_b) + w_h h.

A branch whose weight is zero for every sample of a row is not evaluated there. `fastcfg methods` lists what each costs.
"""

from .base import Guidance, GuidancePlan, NoGuidance
from .cfg import CFG, AdaptiveCFG
from .compose import AutoGuidance, Compose, InstructPix2Pix, PerturbedCFG
from .output_methods import APG, APGMix, CFGZeroStar, GramGuidance, MagnitudeAwareCFG, PerpNeg, TangentialCFG

__all__ = ["APG", "CFG", "APGMix", "AdaptiveCFG", "AutoGuidance", "CFGZeroStar", "Compose", "GramGuidance", "Guidance"]
__all__ += ["GuidancePlan", "InstructPix2Pix", "MagnitudeAwareCFG", "NoGuidance", "PerpNeg", "PerturbedCFG"]
__all__ += ["TangentialCFG"]
