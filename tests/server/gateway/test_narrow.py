"""A gateway whose language workers take narrow embeddings."""

from pathlib import Path

import pytest

from common.grants import GrantSigner
from common.security import Credentials
from protos import embeddings_pb2 as pb
from tests.server.fakes.language_worker import FakeLanguageWorker
from tests.server.fakes.requests import image_part
from tests.server.fakes.stack import start_stack
from tests.server.fakes.vision_worker import FakeVisionWorker
from tests.server.gateway.helpers import A

TOKEN = "a-token-of-this-cluster"
DTYPES = {"embedding_dtypes": [pb.FLOAT32, pb.INT8, pb.FP8]}


@pytest.mark.parametrize("dtype", [pb.INT8, pb.FP8])
async def test_the_language_workers_dtype_is_requested_and_granted(tmp_path: Path, dtype: int) -> None:
    worker = Credentials(TOKEN)
    vision, language = FakeVisionWorker(f"unix:{tmp_path}/vision", worker), FakeLanguageWorker(tmp_path, 0, credentials=worker)
    vision.description, language.sink.dtype, language.sink.model_dtype = DTYPES, dtype, pb.BFLOAT16
    async with start_stack(tmp_path, [vision], [language], cluster_token=TOKEN) as stack:
        assert (await stack.chat(image_part(A))).status == 200
        call = stack.vision.calls[-1]
        assert call.dtype == dtype
        terms = GrantSigner(worker).verify(call.images[0].grant, call.images[0].key)
        assert terms.max_bytes == 13 * 256 * (4 + 4), "a scale and a byte per value"
        metrics = (await stack.get("/metrics")).body.decode()
        assert 'dtype="bfloat16"' in metrics, "it is the dtype in which the model computes"


async def test_each_dtype_has_an_embedding_of_its_own(tmp_path: Path) -> None:
    vision, language = FakeVisionWorker(f"unix:{tmp_path}/vision"), FakeLanguageWorker(tmp_path, 0)
    vision.description = DTYPES
    keys = set()
    for dtype in DTYPES["embedding_dtypes"]:
        language.sink.dtype = dtype
        async with start_stack(tmp_path, [vision], [language]) as stack:
            assert (await stack.chat(image_part(A))).status == 200
            keys.add(stack.vision.calls[-1].images[0].key)
    assert len(keys) == 3


async def test_an_older_vision_worker_is_named_and_text_is_served(tmp_path: Path) -> None:
    vision, language = FakeVisionWorker(f"unix:{tmp_path}/vision"), FakeLanguageWorker(tmp_path, 0)
    vision.description = DTYPES
    language.sink.dtype = pb.INT8
    async with start_stack(tmp_path, [vision], [language]) as stack:
        vision.description = {}
        await stack.wait_until_not_ready()
        response = await stack.chat(image_part(A))
        assert (response.status, response.error["code"]) == (503, "checkpoint_mismatch")
        assert (
            "takes embeddings in int8 (--embedding-dtype), but a vision worker delivers bfloat16" in response.error["message"]
        )
        assert (await stack.chat("text")).status == 200
