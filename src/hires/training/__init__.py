"""Training of the embedded models on camera views of scenes. Recipes and curves: docs/training.md.

Each model trains by itself: tiny-vae first, then tiny-flux and tiny-sdxl on its latents; tiny-clip on pixels.
Adapters for Scale-DiT (`scale_dit`) train on a finished FLUX model.
"""
