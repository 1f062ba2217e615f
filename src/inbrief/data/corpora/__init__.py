"""Documents: named corpora and what each yields."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from inbrief.config import Data
from inbrief.io.errors import InbriefError
from inbrief.storyworld import world


@dataclass(frozen=True)
class Document:
    """`id` is stable: the same document has the same id in every corpus size and order."""

    id: str
    text: str


def _storyworld(data: Data) -> Iterator[Document]:
    for i in range(data.documents):
        yield Document(f"storyworld:{data.seed}:{i}", world.story(data.seed, i))


CORPORA: dict[str, Callable[[Data], Iterator[Document]]] = {"storyworld": _storyworld}


def documents(data: Data) -> Iterator[Document]:
    """The documents `data` names. Raises InbriefError for an unknown corpus."""
    if data.corpus not in CORPORA:
        raise InbriefError(f"data.corpus must be one of {', '.join(CORPORA)}; got {data.corpus!r}.")
    return CORPORA[data.corpus](data)
