"""Every public name of version 0.1.0 as first built still imports, from where it was."""

from __future__ import annotations

import importlib
import warnings

import pytest

# By module, as of the last commit before the packages were laid out anew.
NAMES = {
    "fastcfg": (
        "APG APGMix AdaptiveCFG AutoGuidance CFG CFGZeroStar ClassifierFree Compose DynamicThreshold "
        "GramGuidance Guidance InstructPix2Pix MagnitudeAwareCFG NoGuidance PerpNeg PerturbedCFG Preview "
        "Sampler Schedule Step StepTable TangentialCFG accelerate solvers"
    ),
    "fastcfg.blender": "Blender",
    "fastcfg.compiler": (
        "Compiled CompiledScheduler NextTimestep compile_sampler compile_scheduler compile_timesteps "
        "scheduler_clip trace_sampler"
    ),
    "fastcfg.conditioning": "Alike Conditioning Same Shared check_conditioning",
    "fastcfg.files": "replacing write_text",
    "fastcfg.fingerprint": "Fingerprint torch_settings",
    "fastcfg.frontends": "ClassifierFree accelerate",
    "fastcfg.frontends.accelerate": "accelerate",
    "fastcfg.frontends.classifier_free": "ClassifierFree",
    "fastcfg.frontends.diffusers": "fuse",
    "fastcfg.frontends.glide": (
        "CHECKPOINT_NAMES GaussianDiffusion SpacedDiffusion betas_for_alpha_bar create_gaussian_diffusion "
        "create_model create_model_and_diffusion get_beta_schedule get_named_beta_schedule glide_tokenizer "
        "load_checkpoint model_and_diffusion_defaults model_and_diffusion_defaults_upsampler space_timesteps"
    ),
    "fastcfg.frontends.guided_diffusion": (
        "GaussianDiffusion LossType ModelMeanType ModelVarType NUM_CLASSES SpacedDiffusion "
        "betas_for_alpha_bar classifier_and_diffusion_defaults classifier_defaults create_classifier "
        "create_classifier_and_diffusion create_gaussian_diffusion create_model create_model_and_diffusion "
        "diffusion_defaults get_named_beta_schedule model_and_diffusion_defaults space_timesteps "
        "sr_create_model sr_create_model_and_diffusion sr_model_and_diffusion_defaults"
    ),
    "fastcfg.frontends.k_diffusion": "fuse",
    "fastcfg.frontends.recipes": "classifier_gradient load_samples save_samples to_uint8",
    "fastcfg.graphs": "CaptureError Comparison CudaGraph Examined Opaque Pool StandIn compare examine is_compiled",
    "fastcfg.guidance": (
        "APG APGMix AdaptiveCFG AutoGuidance CFG CFGZeroStar Compose GramGuidance Guidance GuidancePlan "
        "InstructPix2Pix MagnitudeAwareCFG NoGuidance PerpNeg PerturbedCFG TangentialCFG"
    ),
    "fastcfg.inpainting": "KnownPixels checked_inpainting",
    "fastcfg.models": (
        "EncoderUNetModel InpaintText2ImUNet SuperResInpaintText2ImUnet SuperResModel SuperResText2ImUNet "
        "Text2ImUNet Tokenizer UNetModel"
    ),
    "fastcfg.models.checkpoint": "CheckpointMeta has_header load_checkpoint save_checkpoint",
    "fastcfg.models.clip": (
        "Affine AttentionResblock CLIPModel FeatureExtractor FullyConnectedResblock HasEncode ImageEmbedding "
        "ImageEncoder LayerNorm TextEmbedding TextEncoder TransformerBlock create_clip_model"
    ),
    "fastcfg.models.glide": (
        "create_model describe_model model_and_diffusion_defaults model_and_diffusion_defaults_upsampler"
    ),
    "fastcfg.models.guided_diffusion": (
        "classifier_and_diffusion_defaults classifier_defaults create_classifier create_model "
        "diffusion_defaults model_and_diffusion_defaults sr_create_model sr_model_and_diffusion_defaults"
    ),
    "fastcfg.models.loading": "load_network",
    "fastcfg.models.vocabulary": "glide_tokenizer read_tokenizer vocabulary_files",
    "fastcfg.models.weights": "load_weights read_state_dict",
    "fastcfg.noise": "INITIAL_STREAM STEP_STREAM philox4x32 philox_normal sample_seeds",
    "fastcfg.ops": (
        "BACKENDS GuidedStep QuantileBound dynamic_threshold gram guidance_blend guided_step inductor_problem "
        "initial_noise is_channels_last posterior_mean_variance predict_x0 quantile_bound resolve_backend "
        "split_model_output triton_problem"
    ),
    "fastcfg.parity": (
        "Error Finding PipelineProblem Problem as_json check_loops check_model check_pipeline check_steps "
        "load_problem plot runnable table"
    ),
    "fastcfg.pipeline": "SOLVERS TextToImage",
    "fastcfg.programs": "Decision",
    "fastcfg.reference": (
        "ReferenceBound ReferenceStep Scratch blend bound gaussian gram pieces quantile_bound rescale_factor table_step"
    ),
    "fastcfg.reference.bound": "bits_per_dimension prior_bpd training_losses vb_terms",
    "fastcfg.reference.gaussian": (
        "condition_mean condition_score ddim_reverse_sample ddim_sample p_mean_variance p_sample "
        "predict_eps_from_xstart predict_xstart_from_eps predict_xstart_from_xprev q_mean_variance "
        "q_posterior_mean_variance q_sample"
    ),
    "fastcfg.reference.gram": "gram rescale_factor",
    "fastcfg.reference.pieces": (
        "guidance_blend posterior_mean_variance predict_x0 quantile_bound split_model_output threshold"
    ),
    "fastcfg.run": "Preview Previews ProgressBar Run Step",
    "fastcfg.sampler": "Preview Sampler Step",
    "fastcfg.schedule": "Schedule betas_for_alpha_bar consistency_timesteps legacy_betas named_betas space_timesteps",
    "fastcfg.sigmas": (
        "ALIGN_YOUR_STEPS SPACINGS align_your_steps beta discrete_sigmas exponential flow flow_mu "
        "from_schedule karras polyexponential"
    ),
    "fastcfg.solvers": (
        "Denoiser ddim ddim_cfg_pp ddim_extrapolated ddim_reverse ddpm deis dpm2 dpm2_ancestral dpmpp_2m "
        "dpmpp_2m_sde dpmpp_2s_ancestral dpmpp_3m_sde euler euler_ancestral euler_ancestral_cfg_pp "
        "euler_cfg_pp heun langevin lcm lms plms predictor_corrector prk sa_solver sgld tcd unipc"
    ),
    "fastcfg.sources": "NoiseSource cuda_normal_offset philox_source recorded_source torch_source",
    "fastcfg.stage": "SOLVERS Stage",
    "fastcfg.step": "StepBuffers StepSpec",
    "fastcfg.stepper": "Stepper",
    "fastcfg.table": "COLUMNS DEVICE_COLUMNS MAX_HISTORY NO_NOISE StepTable",
    "fastcfg.threshold": "DynamicThreshold MAX_SIZE Place",
    "fastcfg.training.config": "TrainConfig require",
    "fastcfg.training.curve": "plot read_log thin",
    "fastcfg.training.data": "ShapesData evaluation_prompts",
    "fastcfg.training.ema": "EMA",
    "fastcfg.training.folder": "Picture PictureFolder PictureReader to_array",
    "fastcfg.training.folder_config": "FolderConfig",
    "fastcfg.training.folder_data": "FolderData",
    "fastcfg.training.folder_task": "FolderTask",
    "fastcfg.training.judge": "Finding Verdict connected_components find_objects judge",
    "fastcfg.training.layout": "LayoutHead",
    "fastcfg.training.losses": "HybridLoss LossTerms",
    "fastcfg.training.reading": "ReadingHeads batch_targets reading_parameters reading_targets train_reading",
    "fastcfg.training.recipes": "make_recipe read_recipe",
    "fastcfg.training.shapes": "Scene SceneObject caption render render_batch render_named sample_scene shape_coverage",
    "fastcfg.training.shapes_config": "ShapesConfig",
    "fastcfg.training.shapes_task": "ShapesTask build_model",
    "fastcfg.training.task": "Task seed_for",
    "fastcfg.training.train": "TrainResult draw_noise make_task train",
    "fastcfg.upsampler": "Upsampler",
}


@pytest.mark.parametrize("module", NAMES)
def test_public_names_still_import(module: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = importlib.import_module(module)
        for name in NAMES[module].split():
            if not hasattr(found, name):  # `from package import module`
                importlib.import_module(f"{module}.{name}")


@pytest.mark.parametrize("statement", ["import fastcfg.pipeline", "from fastcfg import noise", "fastcfg.stepper"])
def test_an_old_name_warns_where_it_is_used(statement: str) -> None:
    code = "\n".join(
        [
            "import sys, fastcfg",
            "for name in ('pipeline', 'noise', 'stepper'):",
            "    sys.modules.pop('fastcfg.' + name, None)",
            "    vars(fastcfg).pop(name, None)",
            statement,
        ]
    )
    with pytest.warns(DeprecationWarning, match="has moved to fastcfg") as caught:
        exec(compile(code, "user.py", "exec"), {"__name__": "user"})
    assert [(warning.filename, warning.lineno) for warning in caught] == [("user.py", 5)]
