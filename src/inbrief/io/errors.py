"""What a user can put right."""

from __future__ import annotations


class InbriefError(Exception):
    """A mistake the user can mend: states the invariant, what was found and the way out. The command exits with 2."""
