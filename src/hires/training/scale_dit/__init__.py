"""Scale-DiT's adapter: a LoRA for the low-resolution image alone (arXiv 2510.16325, sections 3.2 and 3.3).

Flow matching on native crops, each guided by its own reduced version, with the visibility of inference: one pass over
the low-resolution image with the LoRA on, whose keys and values the high-resolution pass sees with the LoRA off. The
gradient reaches the LoRA through these keys and values only.

    recipe.py     everything that an adapter is made from: one YAML file
    loss.py       `velocity_loss`, and the LoRA itself
    data.py       pictures to latents, and what chance decides about them
    trainer.py    `train`: the loop, looks on the way, checkpoints
"""
