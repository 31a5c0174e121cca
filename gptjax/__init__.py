"""nanoGPT reborn in JAX: train, sample and ship GPTs from a laptop to a pod."""
