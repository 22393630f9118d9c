"""Templates of one expression or a few statements: what real ones use of Jinja and Python, and where engines differ."""

D = "{'b': 1, 'a': [1, 2.0, none, true], 'items': 'x'}"
LONG = "'One two.\\n  three\\r\\nfour\\x0bfive\\u2028six\\n'"

EXPRESSIONS = [
    # Values as text.
    "{{ true }} {{ false }} {{ none }} {{ 1 }} {{ 1.0 }} {{ -0.5 }} {{ 1e3 }} {{ 7 // 2 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 7 / 2 }} {{ 2 ** 3 }}",
    f"{{{{ {D} }}}}",
    "{{ ['a', \"it's\", 'q\"', 'l\\n', 'ü', (1,), (1, 2)] }}",
    f"{{{{ {D} | string }}}} {{{{ 'x' ~ {D} ~ none ~ true ~ 1.5 }}}}",
    "[{{ missing }}][{{ missing ~ 'x' }}][{{ missing | length }}][{{ missing | default('d') }}][{{ '' | default('d', true) }}]",
    "{{ 1e16 }} {{ 1e-5 }} {{ 123456789012345678901234567890 }}",
    # tojson.
    f"{{{{ {D} | tojson }}}} {{{{ {D} | tojson(indent=2) }}}} {{{{ {D} | tojson(separators=(',', ':')) }}}}",
    f"{{{{ {D} | tojson(sort_keys=true, indent=none) }}}} {{{{ [] | tojson(indent=4) }}}} {{{{ {{}} | tojson(indent=4) }}}}",
    "{{ 'ü \"q\" \\\\ / \\n \\t <b>&\\'' | tojson }} {{ 'ü 👩 ~' | tojson(ensure_ascii=true) }} {{ '\\x7f' | tojson(true) }}",
    "{{ [1e16, 1e-5, 0.1, -0.0, 1.5, 1e22] | tojson }} {{ {1: 2, none: 3, true: 4, 1.5: 5} | tojson }} {{ (1, 2) | tojson(indent='\\t') }}",
    "{{ messages | tojson(indent=4, ensure_ascii=False) }}",
    # Text.
    "{{ ' a b '.strip() }}|{{ 'xxaxx'.strip('x') }}|{{ 'xya'.lstrip('yx') }}|{{ 'ayx '.rstrip() }}|{{ '\\n\\n a'.lstrip('\\n') }}",
    "{{ 'a,b,,c'.split(',') }}{{ ' a  b '.split() }}{{ 'a b c'.split(' ', 1) }}{{ 'a,b,c'.split(',')[-1] }}{{ 'a</think>b'.split('</think>')[0] }}",
    "{{ ''.split() }}{{ ''.split(',') }}{{ 'abc'.split('x') }}{{ 'a  b  c '.split(none, 1) }}",
    "{{ 'a,b,c'.rsplit(',', 1) }}{{ ' a  b c '.rsplit() }}{{ ' a  b c '.rsplit(none, 1) }}{{ 'abc'.rsplit('') if false }}",
    "{{ 'a=b=c'.partition('=') }}{{ 'a=b=c'.rpartition('=') }}{{ 'abc'.partition('=') }}{{ 'abc'.rpartition('=') }}",
    "{{ 'abc'.startswith('a') }}{{ 'abc'.endswith(('x', 'c')) }}{{ 'abc'.startswith(('x', 'y')) }}{{ 'abc'.find('c') }}{{ 'abc'.find('x') }}{{ 'übc'.index('c') }}{{ 'abab'.rfind('a') }}",
    "{{ 'abc'.upper() }}{{ 'ABC'.lower() }}{{ 'hello wOrld'.title() }}{{ 'hELLO'.capitalize() }}{{ 'aXa'.replace('a', 'b') }}{{ 'aaa'.replace('a', 'b', 2) }}{{ 'aBc'.swapcase() }}",
    "{{ 'prefix-x'.removeprefix('prefix-') }}{{ 'x.txt'.removesuffix('.txt') }}{{ 'x'.removesuffix('y') }}{{ 'x'.removeprefix('xx') }}",
    "{{ '12'.isdigit() }}{{ 'a1'.isalnum() }}{{ 'ab'.isalpha() }}{{ ' '.isspace() }}{{ 'AB'.isupper() }}{{ 'ab'.islower() }}{{ ''.isdigit() }}",
    "{{ ', '.join(['a', 'b']) }}{{ ''.join([]) }}{{ 'abcabc'.count('b') }}{{ '7'.zfill(3) }}{{ '-7'.zfill(4) }}{{ 'a'.ljust(3) }}|{{ 'a'.rjust(3, '.') }}|{{ 'ab'.center(5, '*') }}{{ 'a'.center(4, '*') }}{{ 'abc'.center(2) }}",
    "{{ '{} and {x}'.format(1, x='y') }}{{ '%s is %d' | format('a', 3) }}{{ '%s-%s' % ('a', 'b') if false }}",
    f"{{{{ {LONG}.splitlines() | join('|') }}}}{{{{ {LONG}.splitlines(true) | join('|') }}}}",
    "{{ 'abc'[0] }}{{ 'abc'[-1] }}{{ 'abcdef'[1:3] }}{{ 'abcdef'[::-1] }}{{ 'abcdef'[:-2] }}{{ 'abcdef'[-2:] }}{{ 'abcdef'[::2] }}{{ 'üöä'[1] }}",
    "{% for c in 'aü' %}[{{ c }}]{% endfor %}{{ 'b' in 'abc' }}{{ 'x' not in 'abc' }}{{ 'a' 'b' }}{{ 'ab' * 3 }}{{ '=' * 0 }}{{ 'a' < 'b' }}",
    "{{ 'x\\n\\ty' | indent }}|{{ 'a\\n\\nb\\n' | indent(2) }}|{{ 'a\\n\\nb' | indent(2, true) }}|{{ 'a\\n\\nb' | indent(2, blank=true) }}|{{ 'a\\nb' | indent('> ', first=True) }}",
    "{{ ' a ' | trim }}|{{ 'xax' | trim('x') }}|{{ 'aB' | upper }}{{ 'aB' | lower }}{{ 'ab cd' | title }}{{ 'aBC' | capitalize }}{{ 'abc' | replace('b', 'x') }}{{ 'abc' | first }}{{ 'abc' | last }}{{ 'abc' | length }}",
    "{{ '<a & \"b\">' | escape }}{{ '<a>' | e }}{{ '<a>' | safe }}{{ 'abc' | reverse }}{{ 'abc' | list }}{{ '3' | int + 1 }}{{ 'x' | int }}{{ '1.5' | float }}{{ ' 2.9 ' | int }}{{ 2.9 | int }}{{ none | int }}{{ 'x' | int(7) }}{{ 'x' | float }}{{ 'x' | int(default=-1) }}{{ 'ff' | int(0, 16) }}{{ '12x' | int }}{{ true | int }}",
    "{{ 1e300 | string }}{{ 0.5 | string }}{{ '\\x85 a\\x1c'.splitlines() | length }}{{ ''.splitlines() }}{{ ''.splitlines() | length }}{{ 'a'.isdecimal() }}",
    "{{ '  a' | trim | length }}{{ 'ab' | join('-') }}{{ 'hello world foo' | truncate(length=9) }}",
    # Lists.
    "{{ [3, 1, 2] | sort }}{{ [3, 1] | sort(reverse=true) }}{{ [1, 2, 3] | sum }}{{ [1, 2] | max }}{{ [1, 2] | min }}{{ [1, 2, 1] | unique | list }}{{ [1, 2, 3] | reverse | list }}",
    "{{ [1, 2, 3][1:] }}{{ [1, 2, 3][:-1] }}{{ [1, 2, 3][::-1] }}{{ [1] + [2] }}{{ [1, 2] | join(', ') }}{{ [0] * 3 }}{{ [1, 2].index(2) }}{{ [1, 1].count(1) }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages | map(attribute='role') | list }}{{ messages | rejectattr('role', 'eq', 'user') | map(attribute='content') | join('|') }}",
    "{{ messages | selectattr('tool_calls', 'defined') | list }}{{ messages | groupby('role') | map('first') | list }}{{ [1, 2, 3, 4] | select('odd') | list }}{{ ['a', 'b'] | map('upper') | join }}",
    "{{ messages[0].role }}{{ messages[-1]['content'] }}{{ messages[0]['missing'] }}{{ messages[0].get('missing') }}{{ messages[0].get('missing', 'd') }}{{ (messages | last).role }}{{ messages[9] is defined }}",
    "{{ range(3) | list }}{{ range(1, 6, 2) | list }}{{ range(3, 0, -1) | list }}{{ (range(3) | list)[-1] }}{% for i in range(2) %}{{ i }}{% endfor %}{{ [[1, 2], [3]] | sum(start=[]) }}",
    "{{ [1, 2, 3, 4, 5] | batch(2) | list }}{{ [1, 2, 3, 4, 5] | slice(2) | list }}{{ [(1, 2)] | list }}{{ 2 in [1, 2] }}{{ [1, 2] == [1, 2] }}{{ [1] != [2] }}",
    # Mappings.
    f"{{% for k, v in {D}.items() %}}{{{{ k }}}}={{{{ v }}}};{{% endfor %}}{{% for k in {D} %}}{{{{ k }}}}{{% endfor %}}{{{{ {D} | length }}}}{{{{ 'a' in {D} }}}}",
    f"{{{{ {D}.keys() | list }}}}{{{{ {D}.values() | list }}}}{{{{ {D} | items | list }}}}{{{{ {{'b': 1, 'a': 2}} | dictsort }}}}{{{{ {D}['items'] }}}}{{{{ dict(x=1, y=2) }}}}",
    "{{ {'a': {'b': [1, {'c': 2}]}}.a.b[1].c }}{{ {'get': 1}.get('get') }}{{ {} is mapping }}{{ not {} }}{{ {'a': 1} == {'a': 1.0} }}",
    # Tests.
    "{{ 'a' is string }}{{ 1 is number }}{{ 1 is integer }}{{ 1.0 is float }}{{ true is boolean }}{{ none is none }}{{ [] is sequence }}{{ {} is sequence }}{{ 'a' is sequence }}{{ 1 is sequence }}",
    "{{ [] is iterable }}{{ {} is iterable }}{{ 'a' is iterable }}{{ none is iterable }}{{ 1 is iterable }}{{ missing is iterable }}{{ missing is sequence }}{{ none is sequence }}{{ none is mapping }}{{ missing is mapping }}",
    "{{ missing is defined }}{{ missing is undefined }}{{ none is defined }}{{ 1 is eq 1 }}{{ 1 is not none }}{{ 2 is divisibleby 2 }}{{ 'a' is in ['a'] }}{{ true is true }}{{ 1 is true }}{{ false is false }}{{ 1 is sameas 1 }}",
    "{{ true is number }}{{ true is integer }}{{ 'A' is upper }}{{ 'a' is lower }}{{ 3 is odd }}{{ missing is none }}{{ 1 is gt 0 }}{{ 1 is lessthan 2 }}",
    # Logic.
    "{{ 1 and 2 }}{{ 0 or 'x' }}{{ not 1 }}{{ '' or none }}{{ 1 < 2 < 3 }}{{ 1 < 2 > 3 }}{{ 1 == 1.0 }}{{ 1 == true }}{{ 'a' if false }}{{ 'a' if false else 'b' }}{{ none == false }}{{ '1' == 1 }}",
    "{{ (1, 2)[0] }}{{ 5 | string + 'a' }}{{ 1 + 2 * 3 - 4 }}{{ 'a' ~ 'b' ~ (1 + 2) }}{{ 3.7 | round }}{{ 2.5 | round | int }}{{ 3.14159 | round(2) }}{{ -3 | abs }}{{ 10 | float }}",
    # Statements.
    "{% set ns = namespace(a=1, b=[]) %}{% for i in [1, 2] %}{% set ns.a = ns.a + i %}{% set ns.b = ns.b + [i] %}{% set c = i %}{% endfor %}{{ ns.a }}{{ ns.b }}{{ c }}",
    "{% for i in [1, 2, 3] %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.cycle('a', 'b') }}{{ loop.changed(i) }};{% endfor %}",
    "{% for i in [1, 2, 3, 4] if i is even %}{{ i }}{{ loop.last }}{% else %}none{% endfor %}{% for i in [] %}x{% else %}none{% endfor %}{% for i in missing %}x{% endfor %}",
    "{% for i in [1, 2, 3, 4] %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% macro m(a, b='x', c=none) %}[{{ a }}{{ b }}{{ c }}{{ caller is defined }}]{% endmacro %}{{ m(1) }}{{ m(1, c=2) }}{{ m(1, 2, 3) }}{{ m(b=1, a=2) | upper }}",
    "{% macro m(x) %}<{{ caller(x) }}>{% endmacro %}{% call(y) m(3) %}{{ y }}!{% endcall %}{% set t %}a{{ 1 }}\n{% endset %}[{{ t | trim }}]{% set x, y = 1, 2 %}{{ x }}{{ y }}",
    "{% set top = 1 %}{% macro m() %}{{ top }}{{ messages | length }}{{ bos_token }}{% endmacro %}{{ m() }}{% set top = 2 %}{{ m() }}",
    "{% macro f(n) %}{{ n }}{% if n > 0 %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(3) }}{% for a in [[1, [2]], [3]] recursive %}{% if a is iterable %}({{ loop(a) }}){% else %}{{ a }}{% endif %}{% endfor %}",
    "{% if true %}{% set a = 1 %}{% endif %}{{ a }}{% with b = 2 %}{{ b }}{% set a = 3 %}{% endwith %}{{ a }}{{ b }}{% filter upper %}x{{ 'y' }}{% endfilter %}",
    "{% generation %}a{% set z = 1 %}{% endgeneration %}{{ z }}\n{%- generation -%}\n b\n{%- endgeneration %}\nc{% raw %}{{ x }}{% generation %}{% endraw %}{# {% x #}",
    "  {% if true %}\n  a\n  {% endif %}\n  {%+ if true %}\n b {% endif +%}\n c\n{%- if true -%}\n  d\n{%- endif %}\n\ne {# c #}\n  {# c #}\nf\n",
    "{{ strftime_now('%d %b %Y|%Y-%m-%d %H:%M:%S|%A %B %-d|%j %y %I %p %%') }}{{ strftime_now is defined }}{{ raise_exception is defined }}",
    "a\r\nb{% if true %}\r\nc\r\n{% endif %}\r\n",
    "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ sep_token }}{{ tools }}{{ documents }}{{ add_generation_prompt }}{{ tools is none }}",
]
