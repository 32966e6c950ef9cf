"""The visual tokens of requests: per-image options, `/v1/images/tokens` and `/tokenize` agree with the usage of a chat."""

from typing import Any

from tests.e2e.serving import Answer, Served, image_part, text_part

SQUARE = image_part("square.png")
WIDE = image_part("wide_1300x800.jpg")


def with_options(part: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Returns an image part with these options."""
    return {**part, "image_url": {**part["image_url"], **options}}


def report(answer: Answer) -> dict[str, int]:
    """Returns the parsed X-DvD-Images header."""
    pairs = (pair.split("=") for pair in answer.headers["x-dvd-images"].split("; "))
    return {name: int(value) for name, value in pairs}


def test_image_options(served: Served) -> None:
    def images(part: dict[str, Any], **fields: Any) -> dict[str, int]:
        answer = served.chat(part, "x", max_tokens=1, **fields)
        usage = answer.json["usage"]["prompt_tokens_details"]
        assert usage["image_tokens"] == report(answer)["tokens"]
        return report(answer)

    off = {"mode": "off"}
    assert images(with_options(WIDE, detail="low"), vir=off)["tokens"] == 256
    assert images(with_options(WIDE, detail="high"), vir=off)["tokens"] == 7 * 256
    assert images(with_options(WIDE, max_dynamic_patch=2), vir=off)["tokens"] == 3 * 256
    assert images(with_options(WIDE, vir={"mode": "all"}))["tokens"] == 7 * 64
    again = images(with_options(WIDE, detail="auto"), vir=off)
    assert (again["tokens"], again["reused"]) == (7 * 256, 1)


def test_token_counts_equal_those_of_a_chat(served: Served) -> None:
    parts = [WIDE, SQUARE, text_part("how many tokens?")]
    total = served.post("/v1/images/tokens", {"messages": [{"role": "user", "content": parts}], "route": True}).json["total"]
    images = report(served.chat(*parts, max_tokens=1))
    assert (total["tiles"], total["routed"]["tokens"]) == (images["tiles"], images["tokens"])
    assert total["routed"]["compressed"] == images["compressed"]
    assert total["tokens"]["auto"][0] <= images["tokens"] <= total["tokens"]["auto"][1]
    assert images["encoded"] == 0, "the routed images are not encoded again"


def test_a_prompt_is_tokenized_with_its_images(served: Served) -> None:
    parts = [SQUARE, text_part("x")]
    usage = served.chat(*parts, max_tokens=1).json["usage"]
    result = served.post("/tokenize", {"messages": [{"role": "user", "content": parts}]}).json
    assert (result["count"], result["tokens"].count(4)) == (usage["prompt_tokens"], 1)
    text = served.post("/tokenize", {"prompt": "a b"}).json["tokens"]
    assert served.post("/detokenize", {"tokens": text}).json["prompt"].strip() == "a b"
