"""Chat templates for base models, which bring none: named ones, or one from a file.

| name | an answer | its end | for |
|---|---|---|---|
| ``plain`` | ``Assistant: ...``, after ``User: ...`` | the tokenizer's ``eos_token`` | every base model |
| ``chatml`` | ``<|im_start|>assistant``, a new line, the content | ``<|im_end|>`` | Qwen, SmolLM and others |
| ``llama3`` | ``<|start_header_id|>assistant<|end_header_id|>``, ... | ``<|eot_id|>`` | Llama 3 |
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

_PLAIN = """\
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{{- 'Assistant: ' + message['content'] + eos_token + '\n\n' }}
{%- else %}
{{- message['role'] | capitalize + ': ' + message['content'] + '\n\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- 'Assistant: ' }}
{%- endif %}"""

_CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- endif %}"""

_LLAMA3 = """\
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""

#: Each template with the special tokens that it needs in the vocabulary.
NAMED_TEMPLATES: dict[str, tuple[str, tuple[str, ...]]] = {
    "plain": (_PLAIN, ()),
    "chatml": (_CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama3": (_LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
}


def read_chat_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The template of that name, or in that file, for a tokenizer.

    A named one begins with the token that opens a text where this tokenizer writes one.

    Raises:
        ValueError: If there is no such name or file, or the vocabulary lacks the template's tokens.
    """
    if name not in NAMED_TEMPLATES:
        try:
            template = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"--chat_template {name}: neither a named template ({', '.join(NAMED_TEMPLATES)}) nor a file that can "
                f"be read ({error})"
            ) from error
        if not template.strip():
            raise ValueError(f"--chat_template {name}: the file is empty; it must hold a Jinja template")
        return template
    template, tokens = NAMED_TEMPLATES[name]
    vocabulary = tokenizer.get_vocab()
    if missing := [token for token in tokens if token not in vocabulary]:
        raise ValueError(
            f"--chat_template {name} needs the tokens {', '.join(missing)}, which the tokenizer does not have; take "
            "--chat_template plain, which needs the end-of-text token alone"
        )
    if name == "plain" and tokenizer.eos_token is None:
        raise ValueError("--chat_template plain ends turns with the tokenizer's eos_token, but it has none")
    opens = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return ("{{- bos_token }}\n" if opens else "") + template
