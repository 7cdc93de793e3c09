"""The reweighting strategies: one module each, found by themselves (:mod:`pretrain.methods`)."""
