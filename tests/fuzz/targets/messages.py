"""The messages of a conversation and what goes with them. What is rendered is what Jinja makes of the same data."""

import copy
import json
import random
from pathlib import Path
from typing import Any

from llama_fast.errors import RequestError, TemplateError
from tests.bad_inputs.harness import CheckFailedError, check
from tests.fuzz.mutate import mutate_document
from tests.fuzz.target import Target as Base
from tests.fuzz.targets.template import LLAMA_2, LLAMA_3, MAX_PROMPT, MESSAGES, jinja_environment
from tests.tokenizer_samples import built

_ECHO = "{% for message in messages %}{{ message | tojson }}{{ message }}\n{% endfor %}{{ tools }}{{ documents }}"
_RECURSIVE: list[Any] = []
_RECURSIVE.append(_RECURSIVE)
_ALSO = (
    *(float("nan"), float("inf"), -float("inf"), 1j, b"bytes", bytearray(b"x"), {1, 2}, frozenset(), (), range(3), ...),
    *(object(), object, len, Path("x"), _RECURSIVE, {1: 2}, {None: 1}, {(1, 2): 3}, {"a": float("nan")}, 10**5000),
    *(
        [{"role": "user", "content": "x"}] * 300,
        [{"type": "text", "text": "x"}] * 3000,
        [[[[[]]]]] * 9,
        {"a": [1] * 999},
    ),
    *({"type": "image"}, {"type": "text"}, {"type": "text", "text": None}, [{"type": "text", "text": "two"}] * 2),
)
_KEYS = {
    "content": (None, [], 7),
    "tool_calls": ([], None),
    "name": ("x",),
    "role": ("tool", "ipython", "wat", "", None, 7, ["user"]),
}
_KEYWORDS = {
    "add_generation_prompt": (True, False, None, 1, "yes"),
    "continue_final_message": (True, True, False, 1),
    "tokenize": (True, False),
    "tools": ([{"type": "function", "function": {"name": "f"}}], [], 7, _RECURSIVE, [len]),
    "documents": ([{"title": "a", "text": "b"}], {1, 2}),
    **dict.fromkeys(("date_string", "bos_token", "range", "loop", "a b"), ("x", len)),
}
_VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


class Target(Base):
    refusals = (RequestError, TemplateError)

    def __init__(self) -> None:
        self._tokenizer = built("llama3")
        self._jinja = {source: jinja_environment().from_string(source) for source in (LLAMA_2, LLAMA_3, _ECHO)}

    def make(self, rng: random.Random) -> tuple[str, Any, dict[str, Any]]:
        source = rng.choice((LLAMA_2, LLAMA_3, _ECHO))
        messages: Any = copy.deepcopy(MESSAGES[: rng.choice((0, 1, 2, 3, 4, 4, 4))])
        if rng.random() < 0.9:
            messages = mutate_document(rng, messages, also=_ALSO, keys=_KEYS, raw=False)
        names = rng.sample(list(_KEYWORDS), rng.choice((0, 0, 1, 2)))
        keywords = {name: rng.choice(_KEYWORDS[name]) for name in names}
        return source, messages, keywords

    def run(self, value: tuple[str, Any, dict[str, Any]], folder: Path) -> None:
        source, messages, keywords = value
        keywords = {"tokenize": False, **keywords}
        prompt = self._tokenizer.apply_chat_template(messages, chat_template=source, **keywords)
        if keywords["tokenize"]:
            check(isinstance(prompt, list), f"tokens {prompt!r:.200}")
            return
        if messages and isinstance(messages, list) and isinstance(messages[0], list):  # several conversations
            check(all(isinstance(one, str) for one in prompt), f"prompts {prompt!r:.200}")
            return
        check(isinstance(prompt, str), f"a prompt that is {type(prompt).__name__}")
        check(len(prompt) <= MAX_PROMPT, f"a prompt of {len(prompt):,} characters")
        check(" at 0x" not in prompt, f"an address in the prompt: {prompt!r:.300}")
        if "continue_final_message" not in keywords:
            plain = [{name: part for name, part in one.items() if part is not None} for one in _plain(messages)]
            names = {"tools": None, "documents": None, **_VARIABLES, **_plain(keywords)}
            names["add_generation_prompt"] = bool(keywords.get("add_generation_prompt"))
            expected = self._jinja[source].render({**names, "messages": plain})
            check(prompt == expected, f"rendered as {prompt!r:.300}, by Jinja as {expected!r:.300}")


def _plain(value: Any) -> Any:
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckFailedError(f"rendered what is no JSON: {error}") from error
