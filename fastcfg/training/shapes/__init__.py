"""The embedded model's task: captioned pictures of coloured shapes, drawn as training goes."""

from .scenes import Scene, SceneObject, caption, render, render_batch, render_named, sample_scene, shape_coverage

__all__ = ["Scene", "SceneObject", "caption", "render", "render_batch", "render_named", "sample_scene"]
__all__ += ["shape_coverage"]
