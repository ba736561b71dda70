"""Functions as tools: their calls are read from the policy's turns, and their results answered.

Decides how a function becomes a tool, in which form calls are read, and that a call which goes
wrong is answered, not an error.
"""

import inspect
import json
import re
from collections.abc import Callable
from typing import Any, Literal

from gspo_lightning.bounds import check_at_least
from gspo_lightning.environments.episode import Environment, Turn
from gspo_lightning.environments.messages import MARK, QUESTION, Messages, made_up_calls
from gspo_lightning.environments.tool_calls import FORMS, ToolCall

Form = Literal["hermes", "llama", "mistral", "gpt_oss"]
CUT = " ... (cut)"


class ToolEnvironment(Environment):
    """Answers the policy's tool calls; a turn without a call ends the episode.

    A tool is a function with annotated arguments and a docstring that describes each of them under
    ``Args:``, or an object with such a ``__call__`` and a ``name``. The chat template tells the
    policy of them, where prompts are rendered with one. Calls of a turn are answered in their
    order. A call that cannot be read, names no tool or fails is answered with what is wrong.

    What an answer is worth is for other reward terms to say: they see the policy's turns alone.

    Args:
        tools: Functions or objects.
        form: How calls are written: ``hermes`` (JSON between ``<tool_call>`` tags, as Qwen does),
            ``llama`` (Llama 3.1), ``mistral`` or ``gpt_oss``; ``None`` finds out how the chat
            template writes them.
        role: Who says the results: ``tool``, or ``user`` for templates without tools.
        described: Whether the chat template tells of the tools; without it the prompts must.
        longest: Characters of a result that are kept.
        call_reward: Earned by each call that works.
        error_reward: Earned by each call that goes wrong; below 0 to discourage.

    Raises:
        ValueError: If a tool is not annotated or described, or two have the same name.
    """

    def __init__(
        self,
        tools: list[Callable[..., Any]],
        form: Form | None = None,
        role: Literal["tool", "user"] = "tool",
        described: bool = True,
        longest: int = 4000,
        call_reward: float = 0.0,
        error_reward: float = 0.0,
    ) -> None:
        check_at_least(1, "ToolEnvironment.", longest=longest)
        if not tools:
            raise ValueError("ToolEnvironment.tools is empty; name functions")
        self.tools = tools
        self.form, self.role, self.described, self.longest = form, role, described, longest
        self.call_reward, self.error_reward = call_reward, error_reward
        self.schemas = [schema(tool) for tool in tools]
        names = [each["function"]["name"] for each in self.schemas]
        self.by_name = dict(zip(names, tools, strict=True))
        if len(self.by_name) < len(tools):
            raise ValueError(f"ToolEnvironment.tools: two tools have the same name: {names}")
        self._read = None if form is None else FORMS[form]

    def describe(self, chat: Any) -> None:
        """Give the chat template the tools.

        Raises:
            ValueError: If it has no place for them.
        """
        if not self.described:
            return
        if not re.search(r"\btools\b", chat.source):
            raise ValueError(
                "model.sampler.environment: the chat template tells of no tools; set described: "
                "false and tell of them in data.system_prompt, or use another template"
            )
        chat.arguments["tools"] = self.schemas

    def prepare(self, messages: Messages) -> None:
        """Find out in which form calls are written, and that results are.

        Raises:
            ValueError: If the template writes calls in no known form, or no results.
        """
        results = self._message([("tool", "RESULT", "call00000")])
        messages.check(Turn(results))
        if self._read is None:
            self._read = FORMS[self._form(messages.template)]

    def begin(self, row: dict, seed: int) -> "ToolEpisode":
        """Begin an episode; tools keep nothing for it."""
        if self._read is None:
            raise ValueError("ToolEnvironment.form must be set where there is no chat template")
        return ToolEpisode(self, self._read)

    def answer(self, call: ToolCall) -> tuple[str, bool]:
        """The result of a call as a text, and whether it worked."""
        if call.error is not None:
            return f"error: this call cannot be read: {call.error}", False
        tool = self.by_name.get(call.name)
        if tool is None:
            return f"error: there is no tool {call.name!r}; there are {[*self.by_name]}", False
        try:
            inspect.signature(tool).bind(**call.arguments)
        except TypeError as error:
            return f"error: {call.name}: {error}", False
        try:
            given = tool(**call.arguments)
        except Exception as error:  # of a tool, whatever it is; the policy may try again
            text = f"error: {type(error).__name__}: {error}"
            return self._cut(text), False
        return self._cut(given if isinstance(given, str) else json.dumps(given, default=str)), True

    def _cut(self, text: str) -> str:
        return text if len(text) <= self.longest else text[: self.longest] + CUT

    def _message(self, results: list[tuple[str, str, str]]) -> str | list[dict]:
        """Results, each with the tool's name and the id of the call, as chat messages."""
        if self.role == "user":
            return "\n".join(text for _, text, _ in results)
        return [
            {"role": "tool", "name": name, "tool_call_id": number, "content": text}
            for name, text, number in results
        ]

    def _form(self, template: Any) -> str:
        """The form in which a chat template writes a call, and that reads it again."""
        if template is None:
            raise ValueError(
                "ToolEnvironment.form must be one of "
                f"{[*FORMS]} where prompts are not rendered with a chat template"
            )
        (call,) = made_up_calls([{"name": "probe"}])
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        text = template.render([QUESTION, answer], opens=False)
        text = text.removeprefix(template.render([QUESTION], opens=True))
        whole = re.search(r"(?s).*\}\]?", text)  # without what ends the turn
        text = whole[0] if whole else text
        found = [
            name
            for name, read in FORMS.items()
            if any(one[:2] == ("probe", {"text": MARK}) for one in read(text))
        ]
        if not found:
            raise ValueError(
                f"ToolEnvironment: the chat template writes no tool call that one of {[*FORMS]} "
                "reads; set form to what the prompts ask for, or use another template"
            )
        return found[0]


class ToolEpisode:
    """One conversation; has no state but the number of its calls."""

    def __init__(self, environment: ToolEnvironment, read: Callable[[str], list[ToolCall]]) -> None:
        self.environment, self.read, self.count = environment, read, 0

    def step(self, text: str) -> Turn:
        """Answer the calls of a turn."""
        owner, results, reward = self.environment, [], 0.0
        for call in self.read(text):
            answer, worked = owner.answer(call)
            reward += owner.call_reward if worked else owner.error_reward
            results.append((call.name or "unknown", answer, f"call{self.count:05d}"))
            self.count += 1
        return Turn(owner._message(results) if results else None, reward)


def schema(tool: Callable[..., Any]) -> dict[str, Any]:
    """A tool as chat templates know it.

    Raises:
        ValueError: If it is not annotated or described.
    """
    from transformers.utils.chat_template_utils import get_json_schema  # takes a while

    function = tool if inspect.isroutine(tool) else tool.__call__  # type: ignore[operator]
    name = getattr(tool, "name", None) or getattr(tool, "__name__", type(tool).__name__)
    try:
        found = get_json_schema(function)
    except Exception as error:  # of transformers, several kinds
        text = " ".join(str(error).split())
        raise ValueError(
            f"ToolEnvironment.tools: {name} cannot become a tool: {text}; annotate its arguments, "
            "and describe the function and each of them under Args: in its docstring"
        ) from error
    found["function"]["name"] = name
    return found
