"""The losses of a token: one module each, found by themselves (:mod:`pretrain.methods`)."""
