"""Chat templates: rendered as transformers renders them, and bounded whatever they do."""

from __future__ import annotations

import gc
import subprocess
from datetime import datetime

import psutil
import pytest
from test_chat_ids import INSTRUCT, SYSTEM_LAST, WITH_SYSTEM, WITHOUT_SYSTEM, with_template

from qmix.chat.format import format_of
from qmix.errors import StoreError, UsageError
from qmix.text.chat_template import ChatTemplate, TemplateRefusal

MIXTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, conversation roles must alternate') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- " [INST] " + system_message + "\\n\\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- " [INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token}}
    {%- endif %}
{%- endfor %}
"""
MACROS = """{%- macro told(message) -%}
<{{ message.role|upper }}>{{ message.content | trim | tojson }}
{%- endmacro %}
{%- set ns = namespace(count=0, names=[]) %}
{% for message in messages if message.content %}
  {%- set ns.count = ns.count + 1 %}
  {%- if loop.index > 40 %}{% break %}{% endif %}
{{ told(message) }}{{ "," if not loop.last }} {{ loop.length }}
  {% generation %}{{ message.content[::-1] }}{% endgeneration %}
{% endfor %}
{{ ns.count }} {{ dict(a=1, b=[1.5, none, true])|tojson(indent=2) }} {{ "%s of %d"|format("a", 3) }}
{{ messages|map(attribute="role")|join("/") }} {{ tools is none }} {{ documents is defined }}
{%- if add_generation_prompt %}<|assistant|>{% endif %}
"""
TEMPLATES = [MIXTRAL, MACROS, INSTRUCT, WITH_SYSTEM, SYSTEM_LAST, WITHOUT_SYSTEM]
TALK = [
    {"role": "user", "content": " Wie hei\u00dft du?\n"},
    {"role": "assistant", "content": 'I am <"tiny"> & \U0001f600'},
    {"role": "user", "content": "{{ 7 * 7 }} {% raw %}"},
]


def template_of(tiny, tmp_path, text) -> ChatTemplate:
    return ChatTemplate(with_template(tiny, tmp_path, text))


@pytest.mark.parametrize("text", TEMPLATES)
def test_a_template_gives_what_transformers_gives(tiny, tmp_path, text):
    tokenizer = with_template(tiny, tmp_path, text)
    template = ChatTemplate(tokenizer)
    for messages in (TALK, TALK[:1], TALK[:2], [{"role": "system", "content": "Be brief."}, *TALK]):
        for asks in (True, False):
            options = {"add_generation_prompt": asks}
            try:
                want = tokenizer.apply_chat_template(messages, tokenize=False, **options)
            except Exception as error:
                want = error
            if isinstance(want, Exception):
                with pytest.raises(TemplateRefusal) as caught:
                    template.text(messages, asks)
                assert str(want) in str(caught.value)
                continue
            assert template.text(messages, asks) == want
            ids = tokenizer.apply_chat_template(messages, return_dict=False, **options)
            assert template.ids(messages, asks) == ids


def test_the_date_is_todays(tiny, tmp_path):
    template = template_of(tiny, tmp_path, "{{ strftime_now('%Y') }}")
    assert template.text(TALK, True) in (str(datetime.now().year), str(datetime.now().year - 1))


BOUNDED = {
    "loops in loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "a long text": "{{ 'ab ' * 4 * 10**8 }}",
    "a text that doubles": "{% set ns = namespace(t='ab') %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}"
    "{% endfor %}{{ ns.t }}",
    "a list that doubles": "{% set ns = namespace(t=[1]) %}{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}"
    "{% endfor %}",
    "a power": "{% set n = messages|length + 6 %}{{ n ** (n ** n) }}",
    "a wide field": "{{ '%0999999999d' % 1 }}",
    "a wide format": "{{ '{:>999999999}'.format(1) }}",
    "a filter": "{{ 'a'|center(10**9) }}",
    "much output": "{% for a in range(9999) %}{{ 'a' * 9999 }}{% endfor %}",
    "a macro that calls itself": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
}


@pytest.mark.parametrize("name", BOUNDED)
def test_a_template_has_bounds_of_time_memory_and_length(tiny, tmp_path, name, monkeypatch):
    monkeypatch.setattr("qmix.text.chat_template.SECONDS", 0)  # and the one that is always there
    before = psutil.Process().memory_info().rss
    template = template_of(tiny, tmp_path, f"\n{{% if messages|length > 1 %}}{BOUNDED[name]}{{% endif %}}ok")
    with pytest.raises(TemplateRefusal) as caught:
        template.text(TALK, True)
    assert str(caught.value).startswith(f"{tmp_path / 'chat_template.jinja'}: ")
    assert "\n" not in str(caught.value)
    assert psutil.Process().memory_info().rss - before < 200e6
    assert template.text(TALK[:1], True) == "\nok", "the next text is made"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ bos_token }}\n\n{{ 1 / 0 }}", "line 3: division by zero"),
        ("a\n{{ raise_exception('not like this') }}", "line 2: not like this"),
        ("a\n{{ messages.nothing.more }}", "line 2: "),
        ("a\nb\n{% for %}", "line 3: "),
        ("{{ ().__class__.__base__.__subclasses__() }}", "line 1: "),
    ],
)
def test_an_error_names_file_and_line(tiny, tmp_path, text, message):
    tokenizer = with_template(tiny, tmp_path, text)
    with pytest.raises(TemplateRefusal) as caught:
        ChatTemplate(tokenizer).text(TALK, True)
    assert str(caught.value).startswith(f"{tmp_path / 'chat_template.jinja'}: {message}")
    with pytest.raises(StoreError, match="the chat template cannot be used"):
        format_of(tokenizer)


def test_half_a_surrogate_pair_is_refused_behind_the_template_too(tiny):
    from qmix.text.tokenizer import load_tokenizer

    template = ChatTemplate(load_tokenizer(tiny))
    with pytest.raises(UsageError, match="not UTF-8"):
        template.ids([{"role": "user", "content": "a\ud800"}], True)
    assert template.ids([{"role": "user", "content": "a"}], True)


def test_the_process_ends_with_its_template_and_may_be_killed(tiny, tmp_path):
    template = template_of(tiny, tmp_path, MIXTRAL)
    process = template._process
    assert isinstance(process, subprocess.Popen)
    want = template.text(TALK, True)
    process.kill()
    process.wait()
    assert template.text(TALK, True) == want
    another = template._process
    del template
    gc.collect()
    assert another.returncode is not None
