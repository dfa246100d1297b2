"""Templates are accepted if their work is bounded by their input, and otherwise refused with the line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

import qpcompile
from qpcompile.emit.artifact.template.chat_template import check_template
from qpcompile.errors import ArtifactError, ExportError
from tests.families import llava

TESTBEDS = Path(__file__).resolve().parents[1] / "testbed"
ENDLESS = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"
TURNS = "{% set ns = namespace(a='x', b='y') %}{% for i in range(40) %}BODY{% endfor %}"
HOSTILE = {
    "loops in loops": (ENDLESS, "loops in loops"),
    "loops over messages": ("{% for a in messages %}" * 12 + "{% endfor %}" * 12, "loops in loops"),
    "loops over a list": ("{% set l = [1]*1000 %}" + "{% for a in l %}" * 3 + "{% endfor %}" * 3, "loops in loops"),
    "loop that calls itself": ("{% for a in messages recursive %}{{ loop(a) }}{% endfor %}", "calls itself"),
    "macro that calls itself": ("{% macro f(n) %}{{ f(n-1) }}{{ f(n-1) }}{% endmacro %}{{ f(60) }}", "calls itself"),
    "macro there twice": ("{% macro f() %}{% endmacro %}" * 2, "is there twice"),
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
    "no template": ("{% for %}", "not a template"),
    "too long": ("x" * 200_000, "characters"),
}
# Bodies of `macro f(x, n)` that would call it 2**60 times, or forever: (before it, body).
COUNTING = {
    "an argument": ("", "{% if n > 0 %}{{ f(x[0], n - 1) }}{{ f(x[0], n - 1) }}{% endif %}"),
    "an argument by name": ("", "{% if n > 0 %}{{ f(x.a, n=n - 1) }}{{ f(x.a, n=n - 1) }}{% endif %}"),
    "an argument set before": ("", "{% set n = n - 1 %}{% if n > 0 %}{{ f(x.a, n) }}{{ f(x.a, n) }}{% endif %}"),
    "a range": ("", "{% for i in range(x) %}{{ f(i, n) }}{% endfor %}"),
    "a slice": ("", "{% if x %}{{ f(x[1:], n) }}{{ f(x[1:], n) }}{% endif %}"),
    "a shorter text": ("", "{% for s in x.replace('a', '', 1).split() %}{{ f(s, n) }}{{ f(s, n) }}{% endfor %}"),
    "a dict": ("", "{% for v in dict(a=x.a[1:]).values() %}{{ f(v, n) }}{{ f(v, n) }}{% endfor %}"),
    "another macro": (
        "{% macro g(x, n) %}{{ f(x, n - 1) }}{% endmacro %}",
        "{% if n > 0 %}{{ g(x, n) * 2 }}{% endif %}",
    ),
    "a namespace": (
        "{% set ns = namespace(n=60) %}",
        "{% if ns.n > 0 %}{% set m = ns.n - 1 %}{% set ns.n = m %}{{ f(x.a, n) }}{% set ns.n = m %}{{ f(x.a, n) }}"
        "{% endif %}",
    ),
    "a namespace of another branch": (
        "{% set ns = namespace(n=60) %}",
        "{% if x.b %}{% set ns = namespace(n=60) %}{% endif %}{% set ns.n = ns.n - 1 %}{{ f(x.a, n) }}",
    ),
    "a text that grows": ("{% set ns = namespace(a='xx') %}", "{% set ns.a = ns.a ~ ns.a %}{{ f(x.b, n) }}"),
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
    "macro with parts": "{% macro show(spec, required, nullable=false) %}{% set ns = namespace(found=false) %}"
    "{% for name, inner in (spec.properties or {}).items() %}{% if ns.found %},{% endif %}{% set ns.found = true %}"
    "{% set items = inner['items'] %}{{ show(items, spec.get('required') or []) }}{{ show(inner, required, nullable) }}"
    "{% endfor %}{% endmacro %}{% for tool in tools %}{{ show(tool, tool.required) }}{% endfor %}",
    "text of a turn": "{% macro show(x) %}{% set ns = namespace(found=false) %}{% for k, v in x | dictsort %}"
    "{% if ns.found %},{% endif %}{% set ns.found = true %}{{ k }}{{ show(v) }}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{% set ns = namespace(text='') %}{% for part in m.content %}"
    "{% set ns.text = ns.text + part.text %}{% endfor %}{{ show(ns.text) }}{% endfor %}",
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


@pytest.mark.parametrize(("before", "body"), COUNTING.values(), ids=list(COUNTING))
def test_macro_that_carries_a_counter_down_is_refused(before: str, body: str) -> None:
    text = f"{before}{{% macro f(x, n) %}}{body}{{% endmacro %}}{{{{ f(messages, 60) }}}}"
    with pytest.raises(ArtifactError, match="calls itself"):
        check_template(text, "chat_template.jinja")


@pytest.mark.parametrize("text", REAL.values(), ids=list(REAL))
def test_what_templates_do_is_accepted(text: str) -> None:
    check_template(text, "chat_template.jinja")


def test_compile_refuses_an_unbounded_template_before_it_begins() -> None:
    model, cases = llava()
    words = SimpleNamespace(chat_template={"default": "{{ messages }}", "tools": ENDLESS})
    processor = SimpleNamespace(chat_template="{{ messages }}", tokenizer=words)
    passed: list[object] = []
    with pytest.raises(ExportError, match="loops in loops") as caught:
        qpcompile.compile(
            model, "none", processor=processor, calibration=[cases["one"]], after=lambda *step: passed.append(step)
        )
    assert not passed and "chat_template" in (caught.value.do or "")


@pytest.mark.parametrize("bed", ["llava", "qwen2_5_vl"])
def test_templates_of_the_testbeds_are_accepted(bed: str) -> None:
    check_template((TESTBEDS / bed / "chat_template.jinja").read_text(), bed)
