"""What a model is worth and what it costs: retrieval, zero-shot classification, parameters and MACs."""
