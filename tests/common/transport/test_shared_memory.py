"""The sender's side of shared memory: it writes only into the file of a sink, for the embedding that the sink expects."""

from pathlib import Path

from common.embedding import HEADER_SIZE, Header
from common.transport.shared_memory import write_to_file

HEADER = Header("key", "f" * 64, "bfloat16", 3, 4)


def test_only_a_file_with_the_same_header_is_written(tmp_path: Path) -> None:
    ours, other, link = tmp_path / "ours", tmp_path / "other", tmp_path / "link"
    ours.write_bytes(HEADER.pack())
    other.write_bytes(Header("another", "f" * 64, "bfloat16", 3, 4).pack())
    link.symlink_to(ours)
    data = memoryview(bytes(range(24)))
    assert [write_to_file(str(file), HEADER, data) for file in (other, link, tmp_path / "none", tmp_path)] == 4 * [False]
    assert (other.stat().st_size, ours.stat().st_size) == (HEADER_SIZE, HEADER_SIZE)
    assert write_to_file(str(ours), HEADER, data)
    assert ours.read_bytes() == HEADER.pack() + data
