"""From prompts to pictures: `text_to_image`, `upsampler`, and what they share."""
