"""All APIs of the gateway."""

from server.apis import chat, completions, image_tokens, messages, responses, tokenize
from server.apis.base import Api

APIS: tuple[Api, ...] = (
    *chat.APIS,
    *completions.APIS,
    *responses.APIS,
    *messages.APIS,
    *tokenize.APIS,
    *image_tokens.APIS,
)
