"""The conversation: what was said, the commands, the prompt. Knows the person and the terminal, not HTTP."""

from __future__ import annotations

import re
import select
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from server.terminal.client import Answer, ChatClient, ChatError, Message
from server.terminal.screen import Cleaner, Screen

HELP = """\
/reset         forget the conversation
/system TEXT   set the system prompt; without TEXT: none
/help          this
/quit          leave; so does Ctrl-D
A \\ at the end of a line goes on in the next; pasted lines are one message. Ctrl-C stops an answer.
"""
# Pasted lines follow each other faster than a hand can: none this long after a line is its end.
PASTE_GAP_S = 0.05

Run = Callable[[Coroutine[Any, Any, None]], None]


class Chat:
    """One conversation.

    Args:
        run: runs a coroutine to its end; raises KeyboardInterrupt where Ctrl-C ended it.
        system: "" is none.
    """

    def __init__(self, client: ChatClient, screen: Screen, run: Run, system: str) -> None:
        self.said: list[Message] = []
        self.system = system
        self._client = client
        self._screen = screen
        self._run = run

    def answer_once(self, question: str) -> None:
        """Prints the answer and nothing else. Raises ChatError."""
        if not question.strip():
            raise ChatError("there is no question: give one, or pipe one in")
        self.said.append(_message("user", question))
        show = _Show(self._screen, with_reasoning=False)
        try:
            self._run(self._client.answer(self._messages(), Answer(), show.piece))
        finally:
            self._screen.end_line()

    def talk(self) -> int:
        """Until the person leaves. Raises ChatError where the server is not there to begin with."""
        _prepare_editing()
        self._run(self._greet())
        while True:
            try:
                if not self._turn(_read_message()):
                    return 0
            except EOFError:
                self._screen.write("\n")
                return 0
            except KeyboardInterrupt:
                self._screen.write("\n")
                self._screen.note("Ctrl-D or /quit leaves")

    def _turn(self, text: str) -> bool:
        """Does what was typed; False is the end."""
        if text.strip() in ("/quit", "/exit"):
            return False
        if command := re.match(r"\s*/([a-z]+)(?:\s+|$)(.*)", text, re.DOTALL):
            self._command(command[1], command[2].strip())
        elif text.strip():
            self._ask(text)
        return True

    async def _greet(self) -> None:
        name = await self._client.find_model()
        self._screen.note(f"{name} at {self._client.url}; /help lists the commands, Ctrl-D leaves")

    def _messages(self) -> list[Message]:
        system = [_message("system", self.system)] if self.system else []
        return system + self.said

    def _command(self, name: str, rest: str) -> None:
        if name == "reset":
            self.said.clear()
            self._screen.note("forgotten" + ("; the system prompt stays" if self.system else ""))
        elif name == "system":
            self.system = rest
            self._screen.note("system prompt set" if rest else "no system prompt")
        elif name == "help":
            self._screen.write(HELP, dim=True)
            self._screen.end_line()
        else:
            self._screen.note(f"there is no /{name}; /help lists the commands")

    def _ask(self, question: str) -> None:
        """What failed before a word came is not part of the conversation; what was stopped later is."""
        self.said.append(_message("user", question))
        answer = Answer()
        trouble = ""
        try:
            self._run(self._client.answer(self._messages(), answer, _Show(self._screen).piece))
        except KeyboardInterrupt:
            trouble = "stopped"
        except ChatError as error:
            trouble = str(error)
        finally:
            self._screen.end_line()
        if answer.text or not trouble:
            self.said.append(_message("assistant", answer.text))
        else:
            self.said.pop()
        if trouble:
            self._screen.note(trouble)
        if not trouble or answer.prompt_tokens is not None:
            self._screen.note(summary(answer))
        if answer.explained:
            self._screen.note(answer.explained)


class _Show:
    """Puts the pieces of one answer on the screen: the reasoning dim and apart."""

    def __init__(self, screen: Screen, with_reasoning: bool = True) -> None:
        self._screen = screen
        self._with_reasoning = with_reasoning
        self._cleaners = {True: Cleaner(), False: Cleaner()}
        self._reasoned = False

    def piece(self, text: str, is_reasoning: bool) -> None:
        if is_reasoning and not self._with_reasoning:
            return
        if is_reasoning and not self._reasoned:
            self._screen.note("thinking:")
            self._reasoned = True
        elif not is_reasoning and self._reasoned:
            self._screen.end_line()
            self._screen.write("\n")
            self._reasoned = False
        self._screen.write(self._cleaners[is_reasoning].feed(text), dim=is_reasoning)


def _message(role: str, content: str) -> Message:
    # Bytes that are no text come from terminals and command lines as lone surrogates; JSON has none.
    return {"role": role, "content": content.encode("utf-8", "replace").decode()}


def summary(answer: Answer) -> str:
    """One line of figures, of those that the server gave."""
    parts = []
    if answer.prompt_tokens is not None:
        split = ""
        if answer.cached_tokens is not None:
            computed = answer.prompt_tokens - answer.cached_tokens
            split = f" ({answer.cached_tokens} cached, {computed} computed)"
        parts.append(f"{answer.prompt_tokens} prompt tokens{split}")
    if answer.output_tokens is not None:
        parts.append(f"{answer.output_tokens} generated")
    if answer.first_s is not None:
        parts.append(f"first token after {answer.first_s:.2f} s")
    if (speed := answer.tokens_per_s()) is not None:
        parts.append(f"{speed:.1f} tokens/s")
    if answer.finish_reason == "length":
        parts.append("cut at the token limit")
    elif not answer.text:
        parts.append("no text")
    return ", ".join(parts)


def _prepare_editing() -> None:
    """Line editing with history, where Python has it."""
    try:
        import readline
    except ImportError:
        return
    # Python turns this off for its own prompt; with it a pasted text is one line of input, newlines and all.
    readline.parse_and_bind("set enable-bracketed-paste on")


def _read_message() -> str:
    """One message of one or more lines. Raises EOFError, KeyboardInterrupt."""
    lines = [input("> ")]
    while True:
        if lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(input(". "))
        elif _more_is_waiting():  # a paste, on a terminal or a Python without bracketed paste
            try:
                lines.append(input(""))
            except EOFError:
                break
        else:
            break
    return "\n".join(lines)


def _more_is_waiting() -> bool:
    return bool(select.select([sys.stdin], [], [], PASTE_GAP_S)[0])
