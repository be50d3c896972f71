"""Prompts that make a text of a class name."""

__all__ = ["DEFAULT_TEMPLATES"]

# Prompts of OpenAI's notebook "Prompt_Engineering_for_ImageNet": the plain prompt and the seven best prompts.
DEFAULT_TEMPLATES = (
    "a photo of a {}.",
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
