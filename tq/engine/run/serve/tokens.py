"""Texts and conversations to tokens and back, for clients that only want to count them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tq.engine.run.generate import encode_messages
from tq.engine.run.serve.requests import Request
from tq.errors import UsageError


class Tokens:
    """A model's tokenizer. Threads may share it: nothing here changes it.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
        vocabulary: Number of token ids.
    """

    def __init__(self, tokenizer: Any, vocabulary: int):
        self._tokenizer, self._vocabulary = tokenizer, vocabulary

    def count(self, request: Request) -> int:
        """How many tokens the prompt of a request has, however many the model takes.

        Raises:
            UsageError: The model has no chat template for a conversation.
            TQError: The template refuses the messages.
        """
        if request.messages is None:
            prompt = request.prompt or ""
            return len(self.encode(prompt, special=True) if isinstance(prompt, str) else prompt)
        if not self._tokenizer.has_chat_template:
            raise UsageError("this model has no chat template: it can only continue a text")
        return len(
            encode_messages(
                self._tokenizer,
                list(request.messages),
                request.think,
                tools=request.tools,
                continue_last=request.continue_last,
                variables=request.template_options,
            )
        )

    def encode(self, text: str, special: bool) -> list[int]:
        """The tokens of a text, with those that the tokenizer puts around texts if `special`."""
        return list(self._tokenizer.encode(text, add_special_tokens=special))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones included.

        Raises:
            UsageError: There are no such tokens.
        """
        wrong = [token for token in tokens if not 0 <= token < self._vocabulary]
        if wrong:
            raise UsageError(f"token ids must be from 0 to {self._vocabulary - 1}, not {wrong[0]}")
        return str(self._tokenizer.decode(list(tokens)))
