"""The file of an embedding that is being received, checked before it becomes visible."""

from pathlib import Path

from common import embedding, errors
from common.embedding import Header
from lm_worker.slot_file import SlotFile

_CHECK_ALIGNMENT = 4
"""Parts of a payload are checked at multiples of so many bytes: whole values, and whole scales."""


class IncomingFile:
    """A file that begins with its header and receives the values either from `add` or from a transport that writes into it.

    It is as large as the embedding from the beginning. One that has been used before still has the values of another
    embedding: only what `add` or `mark_placed` counts is the sender's.

    Attributes:
        path: The file, as long as it is incoming.
        header: Header of the embedding.
        bytes_received: Bytes of values that have been added or placed.
    """

    def __init__(self, path: Path, header: Header, file: SlotFile) -> None:
        """Prepare the open file at `path`, which stays the caller's. Raises: `OSError`."""
        self.path = path
        self.header = header
        self.bytes_received = 0
        self._bytes_checked = 0
        self._is_placed = False
        self._file = file
        file.resize(embedding.HEADER_SIZE + header.length)
        file.write(header.pack(), 0)

    @property
    def bytes_unchecked(self) -> int:
        """Bytes of values that were placed and have not been checked yet."""
        return self.bytes_received - self._bytes_checked

    def add(self, values: bytes | memoryview) -> None:
        """Append values.

        Raises:
            InvalidRequest: The values exceed the header's length, are not whole values, or are not finite; or others have been
                placed, which may be those of another embedding.
            OSError: The file cannot be written.
        """
        if self._is_placed:
            raise errors.InvalidRequest(f"Values follow {self.bytes_received} bytes that were placed: expected no others.")
        length, value_size = self.header.length, embedding.DTYPE_SIZES[self.header.dtype]
        if len(values) % value_size:
            raise errors.InvalidRequest(f"A chunk has {len(values)} bytes, which is not a multiple of {value_size}.")
        if self.bytes_received + len(values) > length:
            raise errors.InvalidRequest(f"The delivery has more than the {length} bytes that its header declares.")
        embedding.check_values(self.header, values, self.bytes_received)
        self._file.write(values, embedding.HEADER_SIZE + self.bytes_received)
        self.bytes_received += len(values)
        self._bytes_checked = self.bytes_received

    def map(self) -> memoryview:
        """View of the whole file to write values into it, which begin at `embedding.HEADER_SIZE`. Raises: `OSError`.

        It must be released.
        """
        return self._file.map()

    def mark_placed(self, count: int) -> None:
        """Note that the first `count` bytes of values have been written into the file without `add`.

        Raises:
            InvalidRequest: They are more than the embedding has, fewer than before, or values have been added.
        """
        if not self.bytes_received <= count <= self.header.length or (self.bytes_received and not self._is_placed):
            raise errors.InvalidRequest(
                f"{count} bytes of values were placed after {self.bytes_received}; the header declares {self.header.length}."
            )
        self.bytes_received, self._is_placed = count, True

    def check_placed(self) -> None:
        """Check the values that have been placed since the last check, while they are in the processor's cache.

        Raises: `InvalidRequest` if they are not what `add` would have accepted.
        """
        end = self.bytes_received
        if end < self.header.length:
            end -= end % _CHECK_ALIGNMENT
        if end <= self._bytes_checked:
            return
        self._check_size()  # of a file that was cut, a read of the mapping would end the process
        offset = embedding.HEADER_SIZE
        with self.map() as whole, whole[offset + self._bytes_checked : offset + end] as values:
            embedding.check_values(self.header, values, self._bytes_checked)
        self._bytes_checked = end

    def finish(self) -> None:
        """Check that the file is complete. Does little the second time.

        Raises:
            InvalidRequest: Values are missing, or what was placed is not what `add` would have accepted.
        """
        if self.bytes_received != self.header.length:
            raise errors.InvalidRequest(
                f"The delivery has {self.bytes_received} bytes; its header declares {self.header.length}."
            )
        self.check_placed()
        if self._is_placed:
            self._check_size()
            with self.map() as whole:
                if whole[: embedding.HEADER_SIZE] != self.header.pack():
                    raise errors.InvalidRequest("The sender has overwritten the header of the embedding.")

    def _check_size(self) -> None:
        if (size := self._file.size) != embedding.HEADER_SIZE + self.header.length:
            raise errors.InvalidRequest(f"The sender has changed the size of the embedding's file to {size} bytes.")
