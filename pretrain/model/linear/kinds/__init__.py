"""The parameterizations of a linear layer: one module each, found by themselves (:mod:`pretrain.methods`)."""
