"""llama-fast chat: a conversation in the terminal."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_fast.cli.common import (
    add_command,
    add_sampling,
    add_where,
    one_line,
    positive,
    read_text,
    sampling_params,
    where,
)
from llama_fast.errors import ContextLengthError, GenerationInterrupted, RequestError, TemplateError
from llama_fast.files import written_whole

if TYPE_CHECKING:
    from llama_fast.engine.llm import LLM
    from llama_fast.engine.sampling import SamplingParams

_EXAMPLES = """examples:
  llama-fast chat                                       with the bundled demo model, which only tells stories
  llama-fast chat ./Llama-3.2-1B-Instruct --system "Be brief." --temperature 0.7
  llama-fast chat ./Llama-3.2-1B --chat-template template.jinja
  printf 'Hi\\nAnd you?\\n' | llama-fast chat ./Llama-3.2-1B-Instruct --json | jq -r .content"""

_COMMANDS = """/clear         forget the conversation; the system message stays
/system TEXT   set the system message, or none
/save FILE     write the conversation as JSON
/help          this list
/exit          leave, as Ctrl-D does
Ctrl-C stops an answer; what was said of it stays in the conversation. At the prompt it leaves."""

# The demo model has no template: it was trained to continue stories, and not to answer.
_PLAIN = "{{ bos_token }}{% for message in messages %}{{ message.content }}{{ '\\n' if not loop.last }}{% endfor %}"


def add(commands: Any) -> None:
    """Add the subcommand to the parser."""
    command = add_command(
        commands,
        "chat [MODEL] [options]",
        "Talk with a model. Each line is a message; the answer is printed as it becomes final.\n"
        "Lines from a pipe or a file are answered one by one. With --json an answer is one JSON object a line.\n"
        "/help lists what else can be typed.",
        _EXAMPLES,
    )
    command.set_defaults(run=run)
    add_where(command)
    command.add_argument(
        "model", nargs="?", metavar="MODEL", help="checkpoint folder or hub id owner/name (default: the demo model)"
    )
    command.add_argument("--system", metavar="PROMPT", help="first message, which says how to answer")
    command.add_argument("--chat-template", metavar="FILE", help="Jinja template in place of the model's")
    command.add_argument("--max-seq-len", type=positive, metavar="N", help="most tokens of the whole conversation")
    add_sampling(command)


def run(args: argparse.Namespace) -> int:
    """Answer until the input ends; returns 1 if a message could not be answered."""
    args.seed = secrets.randbits(32) if args.seed is None else args.seed
    params = sampling_params(args)
    template = None if args.chat_template is None else read_text(args.chat_template)

    from llama_fast.demo import PATH
    from llama_fast.engine.llm import LLM

    llm = LLM(args.model or PATH, max_batch=1, max_seq_len=args.max_seq_len, **where(args))
    if template is None and llm.tokenizer.chat_template is None:
        if args.model is not None:
            raise TemplateError(
                f"{args.model} has no chat template: it was not made for conversations; pass --chat-template FILE, or "
                "let it continue a text with llama-fast generate"
            )
        template = _PLAIN
        _tell(args, "the demo model continues stories and cannot answer; your lines are given to it as they are")
    chat = _Chat(llm, params, template, args)
    terminal = sys.stdin is not None and sys.stdin.isatty()
    if terminal:
        _tell(args, f"seed {args.seed}; /help lists the commands, Ctrl-D leaves")
    failed = False
    while True:
        try:
            line = _line(terminal)
            if line is None or not chat.take(line.strip()):
                return int(failed and not terminal)
        except (RequestError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            failed = True
            hint = "; this message was not taken, /clear starts anew" if isinstance(error, ContextLengthError) else ""
            print(f"llama-fast: error: {one_line(error)}{hint}", file=sys.stderr)


class _Chat:
    """The conversation and what can be done with it."""

    def __init__(self, llm: LLM, params: SamplingParams, template: str | None, args: argparse.Namespace) -> None:
        self._llm = llm
        self._params = params
        self._template = template
        self._args = args
        self._system: str | None = args.system
        self._turns: list[dict[str, str]] = []

    def take(self, line: str) -> bool:
        """One line; False if it ends the conversation.

        Raises:
            RequestError: it cannot be answered, and is not in the conversation then.
            OSError: it asked for a file that cannot be written.
        """
        command, _, rest = line.partition(" ")
        match command:
            case "":
                pass
            case "/exit":
                return False
            case "/help":
                print(_COMMANDS, file=sys.stderr)
            case "/clear":
                self._turns.clear()
            case "/system":
                self._system = rest or None
            case "/save":
                self._save(rest)
            case _ if command.startswith("/"):
                raise RequestError(f"there is no command {command[:40]!r}; /help lists them")
            case _:
                self._answer(line)
        return True

    def _messages(self) -> list[dict[str, str]]:
        return [*([] if self._system is None else [{"role": "system", "content": self._system}]), *self._turns]

    def _save(self, name: str) -> None:
        if not name:
            raise RequestError("/save needs a file name: /save FILE")
        text = json.dumps(self._messages(), ensure_ascii=False, indent=2) + "\n"
        try:
            with written_whole(Path(name)) as temporary:
                temporary.write_text(text, encoding="utf-8")
        except ValueError as error:  # "." or a NUL in it
            raise RequestError(f"cannot save to {name[:80]!r}: {error}") from error
        _tell(self._args, f"saved {len(self._messages())} messages to {name}")

    def _answer(self, text: str) -> None:
        message = {"role": "user", "content": text}
        prompt_ids = self._llm.tokenizer.apply_chat_template(
            [*self._messages(), message], chat_template=self._template, add_generation_prompt=True
        )
        chunks = self._llm.stream(prompt_ids, self._params)
        shown, finish_reason, num_tokens = "", None, 0
        try:
            for chunk in chunks:
                if chunk.error is not None:
                    raise chunk.error
                finish_reason = chunk.finish_reason
                num_tokens += len(chunk.token_ids)
                shown += chunk.text
                if not self._args.json:
                    print(chunk.text, end="", flush=True)  # last: Ctrl-C may strike while it waits
        except KeyboardInterrupt as interrupt:
            try:
                chunks.throw(interrupt)  # told with all that was generated, wherever Ctrl-C struck
            except GenerationInterrupted as told:
                known = told.outputs[0].outputs[0]  # type: ignore[index]
                if not self._args.json:
                    print(known.text[len(shown) :], end="")
                shown, finish_reason, num_tokens = known.text, known.finish_reason, len(known.token_ids)
        self._turns += [message, {"role": "assistant", "content": shown}]
        counts = {"prompt_tokens": len(prompt_ids), "generated_tokens": num_tokens}
        told_as = {"role": "assistant", "content": shown, "finish_reason": finish_reason, **counts}
        print(json.dumps(told_as) if self._args.json else "", flush=True)
        if finish_reason == "length":
            _tell(self._args, f"the answer was cut after {num_tokens} tokens: --max-tokens, or the context is full")


def _line(terminal: bool) -> str | None:
    """The next line; None at the end of the input."""
    if not terminal:
        data = b"" if sys.stdin is None else sys.stdin.buffer.readline()
        return read_text("stdin", data) if data else None
    with suppress(ImportError):  # not on every system
        import readline  # noqa: F401, gives input() its editing and history
    try:
        if sys.stdout.isatty():
            return input("> ")  # readline must know the prompt to redraw it
        print("> ", end="", file=sys.stderr, flush=True)
        return input()
    except EOFError:
        print(file=sys.stderr)
        return None
    except UnicodeDecodeError as error:
        raise RequestError(f"the line is not UTF-8: {error.reason}") from error


def _tell(args: argparse.Namespace, what: str) -> None:
    if not args.quiet:
        print(f"llama-fast: {what}", file=sys.stderr)
