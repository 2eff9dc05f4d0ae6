"""Every scheduler class of diffusers that samples numbers, in configurations that change its steps."""

from __future__ import annotations

from typing import Any

V = {"prediction_type": "v_prediction"}
X0 = {"prediction_type": "sample"}
KARRAS = {"use_karras_sigmas": True}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
NO_CLIP = {"clip_sample": False}
ZERO_SNR = {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
THRESHOLDED = {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}
LEARNED = {"variance_type": "learned_range"}

KINDS: dict[str, list[dict[str, Any]]] = {
    "DDIMScheduler": [{}, {**ZERO_SNR, **NO_CLIP}, {**THRESHOLDED, **NO_CLIP}, {**X0, "set_alpha_to_one": False}],
    "DDIMInverseScheduler": [{}, {**V, **NO_CLIP, "timestep_spacing": "trailing"}],
    "DDIMParallelScheduler": [{}, {**V, **NO_CLIP}],
    "CogVideoXDDIMScheduler": [V, {**X0, "timestep_spacing": "trailing"}],
    "DDPMScheduler": [{}, LEARNED, {"variance_type": "fixed_large", **V}, {"variance_type": "learned", **NO_CLIP},
                      {**THRESHOLDED, **NO_CLIP}],
    "DDPMParallelScheduler": [{}, {**LEARNED, **X0}],
    "UnCLIPScheduler": [LEARNED, {}],
    "LCMScheduler": [{}, V, {"clip_sample": True}],
    "TCDScheduler": [{}, V],
    "EulerDiscreteScheduler": [{}, {**KARRAS, **V, "final_sigmas_type": "sigma_min"}, X0,
                               {"use_exponential_sigmas": True, "timestep_spacing": "trailing"}],
    "EulerAncestralDiscreteScheduler": [{}, V],
    "HeunDiscreteScheduler": [{}, {**KARRAS, **V}, {"clip_sample": True, **X0}],
    "KDPM2DiscreteScheduler": [{}, {**KARRAS, **V}],
    "KDPM2AncestralDiscreteScheduler": [{}, {**KARRAS, **V}],
    "LMSDiscreteScheduler": [{}, {**KARRAS, **V}],
    "IPNDMScheduler": [{}],
    "PNDMScheduler": [{"skip_prk_steps": True}, {"skip_prk_steps": True, **V, "set_alpha_to_one": True}, {}],
    "DPMSolverMultistepScheduler": [{}, {"solver_order": 3, "solver_type": "heun", **KARRAS}, FLOW, THRESHOLDED,
                                    {"algorithm_type": "sde-dpmsolver++", **KARRAS, **V}, LEARNED,
                                    {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
                                    {"euler_at_final": True, "use_lu_lambdas": True, **X0}],
    "DPMSolverMultistepInverseScheduler": [{}, {"solver_order": 3, **V}],
    "DPMSolverSinglestepScheduler": [{}, {"solver_order": 3, **V}, {"solver_order": 1}, {**LEARNED, **KARRAS}],
    "UniPCMultistepScheduler": [{}, {"solver_order": 3, **V}, {"solver_type": "bh1", "predict_x0": False}, FLOW,
                                {"solver_order": 1, **X0}, {"disable_corrector": [0, 1], **THRESHOLDED}],
    "DEISMultistepScheduler": [{}, {"solver_order": 3, **V}, THRESHOLDED],
    "SASolverScheduler": [{}, {"predictor_order": 3, "corrector_order": 4, **V},
                          {"algorithm_type": "noise_prediction"}],
    "EDMEulerScheduler": [{}, {**V, "sigma_schedule": "exponential"}],
    "EDMDPMSolverMultistepScheduler": [{}, {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}],
    "FlowMatchEulerDiscreteScheduler": [{"shift": 3.0}, {"stochastic_sampling": True}, {"use_dynamic_shifting": True},
                                        {"invert_sigmas": True}, {"shift_terminal": 0.1, **KARRAS}],
    "FlowMatchHeunDiscreteScheduler": [{}, {"shift": 2.0}],
    "FlowMatchLCMScheduler": [{}, {"shift": 2.0}],
    "FlowMapEulerDiscreteScheduler": [{}],
    "LTXEulerAncestralRFScheduler": [{}, {"eta": 0.0}],
    "MiniMaxH3Scheduler": [{}],
    # These fall through.
    "CMStochasticIterativeScheduler": [{}, {"clip_denoised": False}],
    "CosineDPMSolverMultistepScheduler": [{}],
    "DPMSolverSDEScheduler": [{"noise_sampler_seed": 3}],
    "CogVideoXDPMScheduler": [V],
    "RePaintScheduler": [{}],
    "KarrasVeScheduler": [{}],
    "DDPMWuerstchenScheduler": [{}],
    "SCMScheduler": [{}],
    "HeliosScheduler": [{}],
}  # fmt: skip
