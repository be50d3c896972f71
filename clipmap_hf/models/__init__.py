"""CLIP models: loading and checking them, their features, their towers taken apart, what names them."""
