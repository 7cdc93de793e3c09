"""The ways to choose experts: one file each (see :mod:`pretrain.methods`)."""
