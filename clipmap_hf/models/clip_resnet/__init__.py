"""CLIP with OpenAI's modified ResNet as its vision tower: config and model, which transformers has none of."""
