"""Chat templates that come with mtk, in the Jinja dialect of ``transformers``.

What stands between ``generation`` and ``endgeneration`` is the assistant's: its answer and the
end of its turn.
"""

from __future__ import annotations

from collections.abc import Mapping

# OpenAI's chat markup.
_CHATML = """\
{%- for message in messages -%}
    {{ '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' -%}
        {% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
    {%- else -%}
        {{ message['content'] + '<|im_end|>' }}
    {%- endif -%}
    {{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""

# Llama 3 Instruct.
_LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['role'] == 'assistant' -%}
        {% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}
    {%- else -%}
        {{ message['content'] | trim + '<|eot_id|>' }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}
"""

# Words that every tokenizer knows; an answer ends with the end of text.
_PLAIN = """\
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{ 'Assistant:' }}
        {%- generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}
    {%- elif message['role'] == 'system' -%}
        {{ message['content'] + '\\n' }}
    {%- else -%}
        {{ message['role'] | capitalize + ': ' + message['content'] }}
    {%- endif -%}
    {{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ 'Assistant:' }}
{%- endif -%}
"""

BUILT_IN: Mapping[str, str] = {"chatml": _CHATML, "llama3": _LLAMA3, "plain": _PLAIN}
