"""OpenAI's `/v1/completions`: text only."""

from server.apis.base import Api

APIS = (
    Api(
        path="/v1/completions",
        summary="Continue a text (OpenAI Completions)",
        example={"model": "InternVL3_5-8B-Flash", "prompt": "Once upon a time", "max_tokens": 32},
        generates_text=True,
        max_tokens_fields=("max_tokens",),
        default_max_tokens=16,
    ),
)
