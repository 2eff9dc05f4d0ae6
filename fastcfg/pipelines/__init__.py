"""From prompts to pictures: a model with its tokenizer and noise schedule, the upsampler, and inpainting."""
