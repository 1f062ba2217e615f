"""inbrief: train and study Natural Language Autoencoders whose explanations are short."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["NLA", "InbriefError", "load"]

if TYPE_CHECKING:
    from inbrief.io.errors import InbriefError
    from inbrief.nla import NLA, load


def __getattr__(name: str) -> Any:
    # Imported on first use: `inbrief --help` must not wait for torch.
    if name in ("NLA", "load"):
        from inbrief import nla

        return getattr(nla, name)
    if name == "InbriefError":
        from inbrief.io.errors import InbriefError

        return InbriefError
    raise AttributeError(f"module 'inbrief' has no attribute {name!r}")
