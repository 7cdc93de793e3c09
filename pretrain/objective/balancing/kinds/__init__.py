"""The losses on routers: one file each (see :mod:`pretrain.methods`)."""
