"""What every attention processor of this package has in common."""

from typing import Any


class WindowedProcessor:
    """An attention processor that stands in for `wrapped` and gives it back."""

    _attention_backend = None
    _parallel_config = None
    wrapped: Any


def stock(processor: Any) -> Any:
    """The processor underneath, however deep contexts are nested."""
    while isinstance(processor, WindowedProcessor):
        processor = processor.wrapped
    return processor
