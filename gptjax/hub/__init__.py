"""Weights in and out: Hugging Face folders and nanoGPT's ckpt.pt."""
