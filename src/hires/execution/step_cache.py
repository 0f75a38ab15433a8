"""Steps that are extrapolated instead of computed: TaylorSeer (arXiv 2503.06923), as diffusers has it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import TaylorSeerCacheConfig

from hires.errors import HiresError

WARM_UP = 3  # steps that are computed before the first extrapolation


@contextmanager
def step_cache(model: Any, interval: int | None, steps: int) -> Iterator[None]:
    """Of the `steps` calls of one stage compute the first three, every `interval`-th and the last; extrapolate others.

    An extrapolated step takes the model's output along its last difference quotient and runs no block. Which steps
    these are depends on their numbers alone, never on the image. Where `interval` is None, nothing happens.
    """
    if interval is None:
        yield
        return
    if model.is_cache_enabled:
        raise HiresError("step_cache: the model has a cache of diffusers on: call disable_cache(), or leave it out")
    model.enable_cache(
        TaylorSeerCacheConfig(
            cache_interval=interval,
            disable_cache_before_step=WARM_UP,
            disable_cache_after_step=steps - 1,
            max_order=1,
            taylor_factors_dtype=model.dtype,
            use_lite_mode=True,
        )
    )
    try:
        yield
    finally:
        model.disable_cache()


def computed_steps(steps: int, interval: int) -> int:
    """How many of a stage's steps are computed."""
    return sum(step < WARM_UP or (step - WARM_UP - 1) % interval == 0 or step == steps - 1 for step in range(steps))
