"""The embedded default data set: API cards made from the docstrings of Python's own standard library.

Nothing is downloaded. The texts are read from the running interpreter; they are part of CPython, copyright the Python
Software Foundation, and used under the PSF License Version 2 (https://docs.python.org/3/license.html).

One card is one chat. The question shows a signature, the answer is a fixed form that no instruction model writes
unasked, so that a few optimizer steps show in the loss and in the text:

    user:      Describe `textwrap.shorten(text, width, **kwargs)`.
    assistant: name: shorten
               module: textwrap
               kind: function
               arguments: text, width, **kwargs
               summary: Collapse and truncate the given text to fit in the given width.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from .samples import Chat

# Present in every CPython >= 3.11 on every platform, and importing one does nothing visible: no window, no browser, no
# readline hook, no printing, no deprecation warning. Modules that a build may leave out (ssl, sqlite3, lzma, ...) would
# make the data set differ between machines with the same Python. inspect and warnings are left out because torch and
# transformers replace functions in them.
_MODULES = """
    abc argparse array ast asyncio base64 binascii bisect calendar cmd code codecs codeop collections configparser
    contextlib contextvars copy copyreg csv dataclasses datetime decimal difflib dis doctest email.charset
    email.encoders email.header email.headerregistry email.message email.parser email.policy email.utils enum
    filecmp fileinput fnmatch fractions ftplib functools gc getpass gettext glob graphlib heapq hmac html
    html.parser http http.client http.cookiejar http.cookies http.server imaplib importlib importlib.machinery
    importlib.metadata importlib.util io ipaddress itertools json.decoder json.encoder linecache locale logging
    logging.config logging.handlers mailbox math mimetypes modulefinder netrc numbers operator optparse os pathlib
    pickle pickletools pkgutil platform plistlib poplib posixpath pprint profile pstats queue quopri random re
    reprlib runpy sched secrets selectors shelve shlex shutil signal smtplib socket socketserver statistics string
    struct subprocess symtable sysconfig tabnanny tarfile tempfile textwrap threading time timeit tokenize trace
    traceback tracemalloc types unittest unittest.mock urllib.parse urllib.request urllib.response
    urllib.robotparser uuid wave weakref wsgiref.handlers wsgiref.headers wsgiref.simple_server wsgiref.util
    xml.dom.minidom xml.etree.ElementTree xml.sax.handler xml.sax.saxutils xml.sax.xmlreader xmlrpc.client
    xmlrpc.server zipfile zipimport
""".split()  # noqa: SIM905 - a list of 130 quoted names is harder to read

# Bounds that keep a card within about 200 tokens, so that no card is cut at ordinary sequence lengths.
_MAX_SIGNATURE_CHARS = 120

_SUMMARY_CHARS = range(20, 201)

_SENTENCE = re.compile(r".+?[.!?](?=\s+[A-Z`'\"]|$)")

_LOOKS_LIKE_A_CALL = re.compile(r"[\w.]+\(")


def stdlib_api_cards(limit: int | None = None) -> list[Chat]:
    """Build the chats, in alphabetical order of module and name, each question once.

    The list depends on the Python version and platform only, not on hash seeds or on what else the process has imported
    (methods that other packages hang on standard classes, as transformers does on ``logging.Logger``, are left out).

    Args:
        limit: Return the first ``limit`` cards only; ``None`` returns all (a few thousand, well under a second).

    Returns:
        Chats of one user and one assistant message each.

    Raises:
        ValueError: If ``limit`` is smaller than 1, or if the interpreter strips docstrings.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}; pass None for all cards")
    if sys.flags.optimize >= 2:
        raise ValueError(
            "this interpreter was started with -OO or PYTHONOPTIMIZE=2, which strips the docstrings of everything "
            "written in Python; start it without, or pass a data set of your own"
        )
    cards: dict[str, Chat] = {}
    for module_name in _MODULES:
        for name, kind, member in _documented_members(importlib.import_module(module_name)):
            card = _card(module_name, name, kind, member)
            if card is not None:
                cards.setdefault(card["messages"][0]["content"], card)
    return list(cards.values())[:limit]


def _documented_members(module: ModuleType) -> Iterator[tuple[str, str, Any]]:
    """Yield (qualified name, kind, object) of a module's own public functions, classes and methods of classes."""
    for name, member in sorted(vars(module).items()):
        if name.startswith("_") or not _is_home(module, name, member):
            continue
        if inspect.isclass(member):
            yield name, "class", member
            for method_name, raw in sorted(vars(member).items()):
                if not method_name.startswith("_") and _is_own_method(member, raw):
                    yield f"{name}.{method_name}", "method", raw
        elif inspect.isroutine(member):
            yield name, "function", member


def _is_own_method(owner: type, raw: object) -> bool:
    """Whether an entry of a class's namespace is a method (no property or attribute) that its own module defines."""
    if not (isinstance(raw, staticmethod | classmethod) or inspect.isroutine(raw)):
        return False
    return getattr(raw, "__module__", None) in (None, owner.__module__)  # methods written in C have no __module__


def _is_home(module: ModuleType, name: str, member: Any) -> bool:
    """Whether ``module`` is where users import ``member`` from: it defines it, or it fronts the C module that does."""
    home = getattr(member, "__module__", None)
    if home == module.__name__:
        return True
    # os.path's functions live in posixpath, heapq's in _heapq, json's in json.encoder: only the accelerator counts as
    # the same.
    return isinstance(home, str) and home.startswith("_") and name in getattr(module, "__all__", (name,))


def _card(module_name: str, name: str, kind: str, member: Any) -> Chat | None:
    """Return the chat for one object, or None where its signature or its docstring makes no good card."""
    parameters = _parameters(kind, member)
    summary = _summary(getattr(member, "__doc__", None))
    if parameters is None or summary is None:
        return None
    signature = f"{module_name}.{name}({_signature_text(parameters)})"
    if len(signature) > _MAX_SIGNATURE_CHARS:
        return None
    arguments = ", ".join(_STARS.get(p.kind, "") + p.name for p in parameters) or "none"
    answer = f"name: {name}\nmodule: {module_name}\nkind: {kind}\narguments: {arguments}\nsummary: {summary}"
    return {
        "messages": [
            {"role": "user", "content": f"Describe `{signature}`."},
            {"role": "assistant", "content": answer},
        ]
    }


_STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def _parameters(kind: str, member: Any) -> list[inspect.Parameter] | None:
    """Return what a caller passes (no ``self`` or ``cls``), or None if Python cannot tell."""
    function = member.__func__ if isinstance(member, staticmethod | classmethod) else member
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError):
        return None
    bound = kind == "method" and not isinstance(member, staticmethod)
    return parameters[1:] if bound else parameters


def _signature_text(parameters: list[inspect.Parameter]) -> str:
    """Render parameters with their defaults; without annotations, which would dominate the line."""
    parts = []
    keyword_only = False
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            keyword_only = True
        elif parameter.kind is inspect.Parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            parts.append("*")
        default = "" if parameter.default is inspect.Parameter.empty else f"={_default_text(parameter.default)}"
        parts.append(_STARS.get(parameter.kind, "") + parameter.name + default)
    return ", ".join(parts)


def _default_text(default: object) -> str:
    """Return the repr of short constants and ``...`` for the rest: other reprs hold addresses or unordered sets."""
    constant = type(default) in (bool, int, float, str, bytes, type(None))
    # Some defaults are paths of this machine: platform.architecture(executable=sys.executable).
    machine_path = isinstance(default, str) and len(default) > 1 and ("/" in default or "\\" in default)
    return repr(default) if constant and not machine_path else "..."


def _summary(doc: object) -> str | None:
    """Return the first sentence of a docstring on one line, or None if it does not read as a sentence."""
    if not isinstance(doc, str):
        return None
    paragraph = " ".join(inspect.cleandoc(doc).split("\n\n", 1)[0].split())
    match = _SENTENCE.match(paragraph)
    sentence = match.group() if match else paragraph
    if sentence[-1:].isalnum() or sentence[-1:] in ")'\"`":
        sentence += "."
    # Generated docstrings (named tuples, some C functions) repeat the call instead of saying what it does.
    starts_well = sentence[:1].isupper() and not _LOOKS_LIKE_A_CALL.match(sentence)
    return sentence if starts_well and sentence.endswith((".", "!", "?")) and len(sentence) in _SUMMARY_CHARS else None


# --- preferences -----------------------------------------------------------------------------------------------------

#: A whole card, and nothing else.
_API_CARD = re.compile(
    r"name: \S.*\nmodule: \S.*\nkind: (?:class|function|method)\narguments: \S.*\nsummary: \S.*", re.ASCII
)


def is_api_card(text: str) -> bool:
    """Whether a text has the form of a card: its five lines in their order, each with something in it."""
    return _API_CARD.fullmatch(text.strip()) is not None


def stdlib_card_preferences() -> Iterator[tuple[str, dict[str, str]]]:
    """Preferences for a card over prose, made from :func:`stdlib_api_cards`: places and rows.

    Both answers say the same, so that the form is all there is to learn::

        prompt:    Describe `textwrap.shorten(text, width, **kwargs)`.
        chosen:    name: shorten
                   module: textwrap
                   ...
        rejected:  The `textwrap.shorten` function is part of Python's `textwrap` module. It takes the arguments text,
                   width, **kwargs. Collapse and truncate the given text to fit in the given width.
    """
    for number, chat in enumerate(stdlib_api_cards(), start=1):
        question, card = (message["content"] for message in chat["messages"])
        fields = dict(line.split(": ", 1) for line in card.split("\n"))
        takes = f"takes the arguments {fields['arguments']}" if fields["arguments"] != "none" else "takes no arguments"
        prose = (
            f"The `{fields['module']}.{fields['name']}` {fields['kind']} is part of Python's `{fields['module']}` "
            f"module. It {takes}. {fields['summary']}"
        )
        yield f"row {number}", {"prompt": question, "chosen": card, "rejected": prose}
