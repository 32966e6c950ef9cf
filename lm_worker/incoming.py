"""The file of an embedding that is being received, checked before it becomes visible."""

import mmap
import os
from pathlib import Path

from common import embedding, errors
from common.embedding import Header


class IncomingFile:
    """A file that begins with its header and receives the values either from `add` or from the sender itself.

    A sender on the same machine opens `path` and writes the values there; `add` is then never called. The file is
    written, not mapped: a new page that is written as a whole is neither zeroed nor faulted in first, which halves the cost.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self.bytes_added = 0
        self._header = header
        self._file = path.open("w+b", buffering=0)
        self._complete = False
        try:
            embedding.write_all(self._file, memoryview(header.pack()))
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; the file itself stays."""
        self._file.close()

    def add(self, values: bytes | memoryview) -> None:
        """Append values.

        Raises:
            InvalidRequest: The values exceed the header's length, are not whole values, or are not finite.
            OSError: The file cannot be written.
        """
        length, value_size = self._header.length, embedding.DTYPE_SIZES[self._header.dtype]
        if len(values) % value_size:
            raise errors.InvalidRequest(f"A chunk has {len(values)} bytes, which is not a multiple of {value_size}.")
        if self.bytes_added + len(values) > length:
            raise errors.InvalidRequest(f"The delivery has more than the {length} bytes that its header declares.")
        embedding.check_values(self._header, values, self.bytes_added)
        embedding.write_all(self._file, memoryview(values))
        self.bytes_added += len(values)

    def finish(self) -> None:
        """Check that the file is complete. Does nothing the second time.

        Raises:
            InvalidRequest: Values are missing, or the sender wrote what `add` would have rejected.
        """
        if self._complete:
            return
        size = os.fstat(self._file.fileno()).st_size - embedding.HEADER_SIZE
        if size != self._header.length or self.bytes_added not in (0, size):
            raise errors.InvalidRequest(
                f"The delivery has {self.bytes_added or size} bytes; its header declares {self._header.length}."
            )
        if not self.bytes_added:
            self._check_what_the_sender_wrote()
        self._complete = True

    def _check_what_the_sender_wrote(self) -> None:
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE  # all pages at once: a page fault for each would cost more than the check
        with mmap.mmap(self._file.fileno(), 0, flags=flags, prot=mmap.PROT_READ) as mapping, memoryview(mapping) as whole:
            if whole[: embedding.HEADER_SIZE] != self._header.pack():
                raise errors.InvalidRequest("The sender has overwritten the header of the embedding.")
            with whole[embedding.HEADER_SIZE :] as values:
                embedding.check_values(self._header, values)
