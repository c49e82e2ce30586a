"""An answer that grows: hand-made tokens, one for each letter."""

from __future__ import annotations

from transformers import GenerationConfig

from qmix.engine.completion import GrowingCompletion, Result
from qmix.engine.generation_config import Decoding

END = ord(".")


def growing(*stops: str) -> GrowingCompletion:
    return GrowingCompletion(
        [1, 2], Decoding(GenerationConfig(), frozenset([END]), stops), lambda ids: "".join(map(chr, ids))
    )


def shown(completion: GrowingCompletion, text: str) -> list[str]:
    return [completion.add(ord(letter)) for letter in text]


def test_text_that_may_begin_a_stop_string_is_held_back_until_it_does_not():
    completion = growing("cat")
    assert shown(completion, "a cup") == ["a", " ", "", "cu", "p"]
    assert (completion.ended, completion.finish_reason, completion.text) == (False, "length", "a cup")


def test_a_stop_string_is_left_out_and_its_tokens_are_kept():
    completion = growing("cat", "dog")
    assert shown(completion, "a cat") == ["a", " ", "", "", ""]
    assert (completion.ended, completion.stopped, completion.finish_reason) == (True, True, "stop")
    assert (completion.finish(), completion.text, completion.token_ids) == ("", "a ", [*map(ord, "a cat")])


def test_an_end_token_ends_and_what_was_held_back_is_shown_last():
    completion = growing("s.x")
    assert shown(completion, "yes.") == ["y", "e", "", ""]
    assert (completion.ended, completion.stopped, completion.finish()) == (True, False, "s.")
    assert (completion.text, completion.prompt_tokens) == ("yes.", 2)


def test_the_summary_says_how_much_of_the_prompt_was_cached():
    numbers = {"ttft_s": 0.5, "tpot_s": 0.25, "total_s": 1.0, "peak_memory": 0, "budget": 0, "hits": 1, "misses": 1}
    whole = {"text": "", "token_ids": [1, 2, 3], "finish_reason": "stop", "prompt_tokens": 60, "seed": 7} | numbers
    result = Result(**whole, hit_rate=0.5, bytes_read=0, reused_tokens=49)
    assert result.summary().startswith(
        "11 new prompt tokens (49 cached) in 0.50 s (22.0 tok/s), 3 new tokens at 4.00 tok/s, "
    )
    assert result.to_json()["usage"] == {"prompt_tokens": 60, "reused_tokens": 49, "completion_tokens": 3}
