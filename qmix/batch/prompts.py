"""Turn lines into requests to the model: apply templates, count tokens, leave room for the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qmix.batch.request import Line
from qmix.engine.running import BatchRequest
from qmix.engine.sampling import Sampling, stream_seed
from qmix.errors import UsageError
from qmix.geometry import Geometry
from qmix.text.chat_template import ChatTemplate, TemplateRefusal
from qmix.text.prompt import PromptEncoder, PromptTooLong
from qmix.text.tokenizer import encode
from qmix.units import plural


class LineRefused(Exception):
    """A line that the model cannot answer; the text is the reason."""


class LineTooLong(LineRefused):
    """A line whose prompt does not fit the context."""


@dataclass(frozen=True, slots=True)
class Asking:
    """Makes requests from lines.

    `encoder` has the tokenizer and the context of prompt and answer, `options` are Sampling's fields for lines that do
    not set them, `seed` is that of the run. Where the template has no system role, the system message is put into the
    first turn.
    """

    encoder: PromptEncoder
    template: ChatTemplate | None
    geometry: Geometry
    options: dict[str, Any]
    seed: int

    def request(self, line: Line) -> BatchRequest:
        """Return the request of a line. Raises LineRefused where the model cannot answer it.

        A line with its own seed is sampled with that; any other with the run's seed and its id.
        """
        if line.refused is not None:
            raise LineRefused(line.refused)
        try:
            prompt = self._ids(line)
            self.encoder.check_count(len(prompt))
        except PromptTooLong as error:
            raise LineTooLong(str(error)) from None
        room = self.encoder.context - len(prompt)
        own = {"seed": stream_seed(self.seed, line.id)} | line.options
        sampling = Sampling(**(self.options | own))
        if sampling.max_new_tokens > room:
            sampling = Sampling(**(self.options | own | {"max_new_tokens": room}))
        try:
            sampling.check_vocabulary(self.geometry.vocab_size)
        except UsageError as error:
            raise LineRefused(str(error)) from None
        return BatchRequest(line.id, prompt, sampling)

    def _ids(self, line: Line) -> list[int]:
        if line.messages:
            ids = self._chat(line.messages, line.tools)
        elif isinstance(line.prompt, str):
            ids = self.encoder.ids(line.prompt) if line.prompt.strip() else []
        else:
            ids = list(line.prompt)
        if not ids:
            raise LineRefused("the prompt is empty")
        bad = next((token for token in ids if not 0 <= token < self.geometry.vocab_size), None)
        if bad is not None:
            raise LineRefused(f"the prompt holds the token id {bad}, outside the model's vocabulary")
        return list(ids)

    def _chat(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[int]:
        if self.template is None:
            raise LineRefused("the model has no chat template; give a prompt instead of messages")
        roles = [message["role"] for message in messages[:2]]
        if not self.template.takes_system and roles in (["system"], ["system", "user"]):
            content = "\n\n".join(message["content"] for message in messages[:2])
            messages = [{"role": "user", "content": content}, *messages[2:]]
        if len(messages) >= self.encoder.context:  # a template adds tokens to each
            raise self.encoder.too_long(f"the prompt has {plural(len(messages), 'message')}")
        try:
            text = self.template.text(messages, True, tools)
        except TemplateRefusal as error:
            raise LineRefused(f"the model's chat template rejects these messages ({error})") from None
        self.encoder.check(text)
        return encode(self.encoder.tokenizer, text, add_special_tokens=False)
