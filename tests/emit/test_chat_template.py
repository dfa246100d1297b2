"""Templates are accepted where their work is bounded by what they are given, and refused by line where it is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from qpcompile.emit.chat_template import check_template
from qpcompile.errors import ArtifactError

TESTBEDS = Path(__file__).resolve().parents[1] / "testbed"
ENDLESS = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"
TURNS = "{% set ns = namespace(a='x', b='y') %}{% for i in range(40) %}BODY{% endfor %}"
HOSTILE = {
    "loops in loops": (ENDLESS, "loops in loops"),
    "loops over messages": ("{% for a in messages %}" * 12 + "{% endfor %}" * 12, "loops in loops"),
    "loops over a list": ("{% set l = [1]*1000 %}" + "{% for a in l %}" * 3 + "{% endfor %}" * 3, "loops in loops"),
    "loop that calls itself": ("{% for a in messages recursive %}{{ loop(a) }}{% endfor %}", "calls itself"),
    "macro that calls itself": ("{% macro f(n) %}{{ f(n-1) }}{{ f(n-1) }}{% endmacro %}{{ f(60) }}", "calls itself"),
    "power": ("{{ 9**9**9 }}", "pow is not read"),
    "repeated text": ("{{ 'x' * 10000000000 }}", "a value of the size"),
    "repeated text by a name": ("{% set n = 100000 %}{{ 'x' * n * n }}", "a value of the size"),
    "doubled on every turn": (TURNS.replace("BODY", "{% set ns.a = ns.a ~ ns.a %}"), "grows by itself"),
    "sum of two": (
        TURNS.replace("BODY", "{% set ns.a = ns.a ~ ns.b %}{% set ns.b = ns.a %}"),
        "grows by itself",
    ),
    "doubled inside": (
        TURNS.replace("BODY", "{% set t = ns.a %}{% for j in range(3) %}{% set ns.a = ns.a ~ t %}{% endfor %}"),
        "grows by itself",
    ),
    "doubled line by line": ("{% set x = 'xx' %}" + "{% set x = x ~ x %}" * 60, "a value of the size"),
    "replaced by itself": ("{% set x = 'aaaaaaaaaa' %}" + "{% set x = x.replace('a', x) %}" * 6, "a value of the size"),
    "filled up": ("{{ 'x' | center(9999999999) }}", "center is not read|a value of the size"),
    "formatted": ("{{ '%9999999999d' % 1 }}", "% with a text"),
    "formatted by a filter": ("{{ '%9999999999d' | format(1) }}", "format is not read"),
    "formatted by a method": ("{{ '{:>9999999999}'.format(1) }}", "format is not read"),
    "filler": ("{{ lipsum(n=100000) }}", "lipsum is not read"),
    "another file": ("{% include '/etc/passwd' %}", "include is not read"),
    "no template": ("{% for %}", "no template"),
    "too long": ("x" * 200_000, "characters"),
}
REAL = {
    "pictures counted": "{% set c = namespace(value=0) %}{% for m in messages %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{% set c.value = c.value + 1 %}Picture {{ c.value }}: <image>"
    "{% elif 'text' in part %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endfor %}",
    "tools, thoughts": "{%- set ns = namespace(last=messages|length - 1) %}{%- for m in messages[::-1] %}"
    "{%- set index = (messages|length - 1) - loop.index0 %}{%- if m.role == 'user' %}"
    "{%- set ns.last = index %}{%- endif %}{%- endfor %}{%- for tool in tools %}{{ tool | tojson(indent=4) }}"
    "{%- endfor %}{%- for m in messages %}"
    "{%- set content = m.content.split('</think>')[-1].lstrip('\\n') %}{{ '<' + m.role + '>' + content }}"
    "{% if loop.index0 % 2 == 1 and not loop.last %}{{ eos_token }}{% endif %}{%- endfor %}",
    "macro down the arguments": "{% macro show(x) %}{% if x is mapping %}{% for k, v in x | dictsort %}"
    "{{ k }}:{{ show(v) }}{% endfor %}{% else %}{{ x }}{% endif %}{% endmacro %}"
    "{% for m in messages %}{{ show(m) }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    "{{ raise_exception('no') if not messages }}{{ strftime_now('%d %b %Y') }}",
    "text put together": "{% set ns = namespace(text='') %}{% for m in messages %}"
    "{% set ns.text = ns.text + m.content + '\\n' %}{% endfor %}{{ ns.text }}",
}


@pytest.mark.parametrize(("text", "message"), HOSTILE.values(), ids=list(HOSTILE))
def test_unbounded_work_is_refused(text: str, message: str) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        check_template(text, "chat_template.jinja")
    assert caught.value.where == "chat_template.jinja" and caught.value.do


@pytest.mark.parametrize("text", REAL.values(), ids=list(REAL))
def test_what_templates_do_is_accepted(text: str) -> None:
    check_template(text, "chat_template.jinja")


@pytest.mark.parametrize("bed", ["llava", "qwen2_5_vl"])
def test_templates_of_the_testbeds_are_accepted(bed: str) -> None:
    check_template((TESTBEDS / bed / "chat_template.jinja").read_text(), bed)
