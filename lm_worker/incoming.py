"""The file of an embedding that is being received, checked before it becomes visible."""

import mmap
import os
from pathlib import Path
from typing import Self

from common import embedding, errors
from common.embedding import Header
from lm_worker.huge_pages import allocate_huge_pages


class IncomingFile:
    """A file that begins with its header and receives the values either from `add` or from a transport that writes into it.

    It is as large as the embedding from the beginning. One that has been used before still has the values of another
    embedding: only what `add` or `mark_placed` counts is the sender's.

    Attributes:
        path: The file, as long as it is incoming.
        header: Header of the embedding.
        bytes_received: Bytes of values that have been added or placed.
    """

    def __init__(self, path: Path, header: Header) -> None:
        """Prepare the file at `path`, which is created if there is none. Raises: `OSError`."""
        self.path = path
        self.header = header
        self.bytes_received = 0
        self._is_checked = True  # by `add`, as far as values were received
        self._file = path.open("r+b" if path.exists() else "w+b", buffering=0)
        try:
            self._set_size(embedding.HEADER_SIZE + header.length)
            embedding.write_all(self._file, memoryview(header.pack()))
        except OSError:
            self.close()
            raise

    def _set_size(self, size: int) -> None:
        """Give the file its final size, and all of its pages: otherwise a write into a mapping would be what fails."""
        descriptor = self._file.fileno()
        previous = os.fstat(descriptor).st_size
        os.ftruncate(descriptor, size)
        if not previous:
            allocate_huge_pages(descriptor)
        if previous < size:
            os.posix_fallocate(descriptor, previous, size - previous)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; the file itself stays."""
        self._file.close()

    def add(self, values: bytes | memoryview) -> None:
        """Append values.

        Raises:
            InvalidRequest: The values exceed the header's length, are not whole values, or are not finite.
            OSError: The file cannot be written.
        """
        length, value_size = self.header.length, embedding.DTYPE_SIZES[self.header.dtype]
        if len(values) % value_size:
            raise errors.InvalidRequest(f"A chunk has {len(values)} bytes, which is not a multiple of {value_size}.")
        if self.bytes_received + len(values) > length:
            raise errors.InvalidRequest(f"The delivery has more than the {length} bytes that its header declares.")
        embedding.check_values(self.header, values, self.bytes_received)
        embedding.write_all(self._file, memoryview(values))
        self.bytes_received += len(values)

    def map(self) -> mmap.mmap:
        """Map the whole file to write values into it, which begin at `embedding.HEADER_SIZE`. Raises: `OSError`."""
        # all pages at once: a page fault for each would cost more than the values
        return mmap.mmap(self._file.fileno(), 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)

    def mark_placed(self, count: int) -> None:
        """Note that so many bytes have been written into the file without `add`. They are checked by `finish`.

        Raises:
            InvalidRequest: They are not all bytes of the embedding, or values have been added.
        """
        if self.bytes_received or count != self.header.length:
            raise errors.InvalidRequest(
                f"The delivery has {self.bytes_received + count} bytes; its header declares {self.header.length}."
            )
        self.bytes_received, self._is_checked = count, False

    def finish(self) -> None:
        """Check that the file is complete. Does nothing the second time.

        Raises:
            InvalidRequest: Values are missing, or what was placed is not what `add` would have accepted.
        """
        if self.bytes_received != self.header.length:
            raise errors.InvalidRequest(
                f"The delivery has {self.bytes_received} bytes; its header declares {self.header.length}."
            )
        if not self._is_checked:
            self._check_placed()
            self._is_checked = True

    def _check_placed(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        if size != embedding.HEADER_SIZE + self.header.length:
            raise errors.InvalidRequest(f"The sender has changed the size of the embedding's file to {size} bytes.")
        with self.map() as mapping, memoryview(mapping) as whole:
            if whole[: embedding.HEADER_SIZE] != self.header.pack():
                raise errors.InvalidRequest("The sender has overwritten the header of the embedding.")
            with whole[embedding.HEADER_SIZE :] as values:
                embedding.check_values(self.header, values)
