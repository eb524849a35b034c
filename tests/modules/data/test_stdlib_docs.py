"""The embedded data set: its form, and that nothing but the Python version changes it."""

import json
import logging
import re
import subprocess
import sys

import pytest

from lightning_qlora.modules.data.stdlib_docs import stdlib_api_cards

QUESTION = re.compile(r"Describe `(?P<module>[\w.]+?)\.(?P<name>[^()]+)\(.*\)`\.")
ANSWER = re.compile(
    r"name: (?P<name>[\w.]+)\nmodule: (?P<module>[\w.]+)\nkind: (function|class|method)\n"
    r"arguments: (none|[\w*]+(, [\w*]+)*)\nsummary: [A-Z].*[.!?]"
)
DUMP = """
import json, sys
from lightning_qlora.modules.data.stdlib_docs import stdlib_api_cards
json.dump(stdlib_api_cards(), sys.stdout)
"""


def run_python(*options: str, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", DUMP]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={"PYTHONHASHSEED": hash_seed})


def answers() -> dict[str, str]:
    return {chat["messages"][0]["content"]: chat["messages"][1]["content"] for chat in stdlib_api_cards()}


def test_a_known_function():
    assert answers()["Describe `textwrap.shorten(text, width, **kwargs)`."] == (
        "name: shorten\nmodule: textwrap\nkind: function\narguments: text, width, **kwargs\n"
        "summary: Collapse and truncate the given text to fit in the given width."
    )


def test_a_method_is_described_without_self():
    found = answers()
    assert (
        "\nkind: method\narguments: max_denominator\n"
        in (found["Describe `fractions.Fraction.limit_denominator(max_denominator=1000000)`."])
    )
    assert "\narguments: a, b\n" in found["Describe `difflib.SequenceMatcher.set_seqs(a, b)`."]


def test_every_card_has_the_form_and_names_what_was_asked():
    cards = stdlib_api_cards()
    assert len(cards) > 2000
    for card in cards:
        (user, assistant) = card["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        question, answer = QUESTION.fullmatch(user["content"]), ANSWER.fullmatch(assistant["content"])
        assert question, user
        assert answer, assistant
        assert f"`{answer['module']}.{answer['name']}(" in user["content"]
        assert len(user["content"]) + len(assistant["content"]) < 600


def test_questions_and_answers_are_unique():
    cards = stdlib_api_cards()
    for position in (0, 1):
        assert len({card["messages"][position]["content"] for card in cards}) == len(cards)


def test_limit_takes_the_first_cards():
    assert stdlib_api_cards(7) == stdlib_api_cards()[:7]
    assert len(stdlib_api_cards(10**6)) == len(stdlib_api_cards())


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit):
    with pytest.raises(ValueError, match=f"at least 1, got {limit}"):
        stdlib_api_cards(limit)


def test_a_bare_interpreter_with_another_hash_seed_gives_the_same_list():
    """This process has torch, transformers and pytest loaded, which patch standard modules."""
    import transformers  # noqa: F401

    bare = run_python("-W", "error", hash_seed="12345")
    assert bare.stderr == ""
    assert json.loads(bare.stdout) == stdlib_api_cards()


def test_methods_hung_on_standard_classes_are_left_out(monkeypatch):
    def shout(self, message):
        """Log a message in capitals, as no standard logger does."""

    monkeypatch.setattr(logging.Logger, "shout", shout, raising=False)
    assert not any("shout" in question for question in answers())


def test_no_path_or_address_of_this_process_gets_in():
    text = json.dumps(stdlib_api_cards())
    assert sys.executable not in text
    assert sys.prefix not in text
    assert not re.search(r" at 0x[0-9a-f]{6}", text)


def test_stripped_docstrings_are_refused():
    stripped = run_python("-OO")
    assert stripped.returncode != 0
    assert "ValueError: this interpreter was started with -OO" in stripped.stderr
