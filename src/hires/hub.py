"""Models of the Hugging Face hub: downloaded once, found in the cache, and a refusal told in one line.

A source is a hub id, `owner/name`, or `owner/name@revision` with a branch, tag or commit.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pyarrow as pa
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_token

from hires.errors import HiresError

CLIP_FILES = ["config.json", "model.safetensors", "*token*.json", "vocab.json", "merges.txt"]
CONTROLNET_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json"]
LOCAL = "fetch it elsewhere (hf download) and give its folder"
NO_PIPELINE = "it is no diffusers pipeline with safetensors weights"
LOGIN = "hf auth login, or HF_TOKEN in the environment"


def page(source: str) -> str:
    """The web page of a model, with its licence and, for a gated one, the form that asks for access."""
    return f"https://huggingface.co/{source.partition('@')[0]}"


def download_pipeline(source: str) -> Path:
    """Folder of a diffusers pipeline: configuration and safetensors weights, no other format.

    HiresError where the hub doesn't give it and the cache doesn't hold it.
    """
    from diffusers import DiffusionPipeline

    repo, _, revision = source.partition("@")
    with explained(source):
        return Path(DiffusionPipeline.download(repo, revision=revision or None, use_safetensors=True))


def download_clip(source: str) -> Path:
    """Folder of a pair of CLIP encoders with its tokenizer; errors as of `download_pipeline`."""
    repo, _, revision = source.partition("@")
    with explained(source):
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=CLIP_FILES))


def download_controlnet(source: str) -> Path:
    """Folder of a ControlNet, configuration and safetensors weights; errors as of `download_pipeline`."""
    repo, _, revision = source.partition("@")
    with explained(source):
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=CONTROLNET_FILES))


def cached(source: str, file: str = "model_index.json") -> Path | None:
    """Folder of what the cache holds of a model, whole or not, without a connection; None where `file` isn't there."""
    repo, _, revision = source.partition("@")
    try:
        found = try_to_load_from_cache(repo, file, cache_dir=constants.HF_HUB_CACHE, revision=revision or None)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


@contextmanager
def explained(source: str, what: str = "", otherwise: str = NO_PIPELINE) -> Iterator[None]:
    """Turn whatever the hub's libraries raise inside the block into one HiresError.

    `what` was asked for, by default the model `source`; `otherwise` is said where the repository answers, but lacks it.
    """
    try:
        yield
    except (HiresError, pa.ArrowException):
        raise
    except (OSError, httpx.HTTPError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        raise HiresError(f"{what or f'model {source!r}'}: {_reason(error, source, otherwise)}") from None


def _reason(error: BaseException, source: str, otherwise: str) -> str:
    """What went wrong and what to do, from the first error of the chain that says it. Never the hub's own words: they
    hold addresses, and may quote what was sent."""
    for cause in _causes(error):
        if (known := _known(cause, source)) is not None:
            return known
    return f"{otherwise} ({type(error).__name__}): see {page(source)}/tree/main"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _known(error: BaseException, source: str) -> str | None:
    where, token = page(source), get_token()
    match error:
        case GatedRepoError() if token is None:
            return f"its owner asks for a login: accept the licence on {where}, then {LOGIN}"
        case GatedRepoError():
            return f"access is not granted to the account of your token: ask for it on {where}"
        case RevisionNotFoundError():
            return f"the hub has no such revision: {where}/commits/main lists them"
        case RepositoryNotFoundError():
            hidden = "it may be private: see that your token may read it" if token else f"for a private one: {LOGIN}"
            return f"the hub has no such repository: check the name at {where}; {hidden}"
        case OfflineModeIsEnabled():
            return f"not whole in the local cache, and HF_HUB_OFFLINE is set: unset it, or {LOCAL}"
        case LocalEntryNotFoundError() | EntryNotFoundError():
            return None  # its cause says why the hub was not asked
        case HfHubHTTPError() if error.response.status_code == 401:
            return f"the hub doesn't accept your token: renew it ({LOGIN})"
        case HfHubHTTPError() if error.response.status_code == 403:
            return (
                f"your token may not read it: give it that right on https://huggingface.co/settings/tokens, see {where}"
            )
        case HfHubHTTPError():
            return f"the hub answered {error.response.status_code}: try again later, or {LOCAL}"
        case httpx.TransportError():
            return f"not whole in the local cache, and no connection to the hub: connect, or {LOCAL}"
        case HFValidationError():
            return "no name that the hub could have: OWNER/NAME or OWNER/NAME@REVISION"
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return "no space left for it: free some, or set HF_HOME to another disk"
    return None
