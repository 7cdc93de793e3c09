"""The optimizers: one file each (see :mod:`pretrain.methods`)."""
