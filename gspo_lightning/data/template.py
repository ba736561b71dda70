"""How columns of a row become its prompt: a text with the names of columns in braces.

Decides what a template may hold: columns alone, no expressions, since it comes from a config and
its values from files.
"""

from string import Formatter

from gspo_lightning.data.tables import column

KEY = "data.prompt_template"


def check_template(template: str) -> list[str]:
    """The columns that a template names, in their order.

    Raises:
        ValueError: If its braces do not match, or hold no column's name.

    >>> check_template("{question} Answer in {{braces}}:")
    ['question']
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        text = f"{KEY} {template!r}: {error}; a brace of the text is written twice: {{{{ or }}}}"
        raise ValueError(text) from error
    names = []
    for _, name, form, conversion in parts:
        if name is None:
            continue
        if not name or form or conversion:
            written = "{" + name + (f"!{conversion}" if conversion else "")
            written += (f":{form}" if form else "") + "}"
            raise ValueError(
                f"{KEY} {template!r}: {written} is no column; write its name alone, such as "
                "{question}, and a brace of the text twice: {{ or }}"
            )
        names.append(name)
    if not names:
        raise ValueError(f"{KEY} {template!r} names no column; write one as {{question}}")
    return names


def with_prompts(
    key: str, path: str, rows: list[dict], template: str, prompt_column: str
) -> list[dict]:
    """Rows with the template's text as their prompt.

    Args:
        key: The setting that names the source, for messages.
        path: The source, for messages.
        rows: They stay as they are.
        template: Names columns of texts and numbers in braces.
        prompt_column: Where the text goes; what stands there is replaced.

    Raises:
        ValueError: For a row without one of the columns, or with another kind of value in it.

    >>> with_prompts("data.path", "x", [{"a": 1, "b": "+"}], "{a}{b}{a}=", "prompt")
    [{'a': 1, 'b': '+', 'prompt': '1+1='}]
    """
    for name in check_template(template):
        values = column(key, path, rows, name, f", which {KEY} names", KEY)
        for number, value in enumerate(values, start=1):
            if not isinstance(value, str | int | float):
                raise ValueError(
                    f"{key}: {path}: row {number}: column {name!r} is a {type(value).__name__}, "
                    f"and {KEY} takes texts and numbers; name another column"
                )
    parts = [(text, name) for text, name, *_ in Formatter().parse(template)]
    return [
        row | {prompt_column: "".join(f"{t}{'' if n is None else row[n]}" for t, n in parts)}
        for row in rows
    ]
