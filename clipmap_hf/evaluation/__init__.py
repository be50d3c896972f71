"""How good a model is: image–text retrieval and zero-shot classification, on one data set or on many."""
