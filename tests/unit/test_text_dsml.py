"""The output parser: however the text is cut, the same pieces; whatever the model writes, no markup and whole JSON."""

from __future__ import annotations

import itertools
import json
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from triptych.text.dsml import OutputParser
from triptych.text.numbers import dumps
from triptych.text.pieces import CallBegin, CallText, Content, Reasoning
from triptych.text.spell import ASSISTANT, END_THINK, EOS, THINK, PlainEncoding, Style
from triptych.text.tools import DSML, ToolCall, calls_block
from triptych.text.turns import Assistant


class Read:
    """All that a parser said about a text that came in these chunks."""

    def __init__(self, chunks: list[str], *, thinking: bool = False, parallel: bool = True) -> None:
        count = itertools.count()
        parser = OutputParser(thinking=thinking, tools=("f", "g"), parallel=parallel, call_id=lambda: f"c{next(count)}")
        self.pieces = [piece for chunk in chunks for piece in parser.push(chunk)] + parser.finish()
        self.content = "".join(p.text for p in self.pieces if isinstance(p, Content))
        self.reasoning = "".join(p.text for p in self.pieces if isinstance(p, Reasoning))
        self.calls: list[list[str]] = []
        for piece in self.pieces:
            if isinstance(piece, CallBegin):
                assert piece.index == len(self.calls)
                self.calls.append([piece.id, piece.name, ""])
            elif isinstance(piece, CallText):
                self.calls[piece.index][2] += piece.text

    @property
    def all(self) -> tuple[Any, ...]:
        return self.reasoning, self.content, self.calls


CALLS = [
    ToolCall("", "f", json.dumps({"path": 'a "b"\n</x> <｜', "n": 3, "deep": {"k": [1, None, "é"]}})),
    ToolCall("", "g", "{}"),
]
WHOLE = "I think.</think>Well, 1 < 2.\n\nSo:" + calls_block(CALLS)


def test_reasoning_text_and_calls() -> None:
    read = Read([WHOLE], thinking=True)
    assert (read.reasoning, read.content) == ("I think.", "Well, 1 < 2.\n\nSo:")
    assert [call[1] for call in read.calls] == ["f", "g"]
    assert [json.loads(call[2]) for call in read.calls] == [json.loads(call.arguments) for call in CALLS]


def test_arguments_come_while_they_are_written() -> None:
    parser = OutputParser(tools=("f",))
    parser.push(f'<{DSML}tool_calls>\n<{DSML}invoke name="f">\n<{DSML}parameter name="text" string="true">')
    assert [type(piece) for piece in parser.push("a long ")] == [CallText]
    assert parser.push("text</") == [CallText(0, "text")]
    assert parser.push("b>") == [CallText(0, "</b>")]


@given(cuts=st.lists(st.integers(0, len(WHOLE)), max_size=30))
def test_any_cut_says_the_same(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(WHOLE)]
    chunks = [WHOLE[a:b] for a, b in itertools.pairwise(places)]
    assert Read(chunks, thinking=True).all == Read([WHOLE], thinking=True).all


_BITS = [
    *(
        "<",
        ">",
        "\n",
        "\n\n",
        DSML,
        f"<{DSML}",
        f"</{DSML}",
        "tool_calls>",
        'invoke name="f">',
        'invoke name="zzz">',
        "invoke>",
    ),
    *('parameter name="a" string="true">', 'parameter name="b" string="false">', "parameter>", "think>", "<think>"),
    *(
        "</think>",
        "</",
        "text",
        '"',
        "{",
        "}",
        "1",
        "null",
        "NaN",
        "｜",
        "é",
        f"</{DSML}parameter>",
        f"</{DSML}invoke>",
    ),
    *(
        f"<{DSML}tool_calls>\n",
        f'<{DSML}invoke name="g">\n',
        f'<{DSML}parameter name="a" string="false">',
        " ",
        "x" * 1100,
        "｜DS",
        "ML｜",
        "<thi",
        "nk>",
    ),
]


@settings(max_examples=1500, deadline=None)
@given(
    bits=st.lists(st.sampled_from(_BITS), max_size=24), thinking=st.booleans(), parallel=st.booleans(), data=st.data()
)
@example(bits=[f"<{DSML}", "tool_calls>"], thinking=True, parallel=True, data=None)
def test_whatever_the_model_writes(bits: list[str], thinking: bool, parallel: bool, data: Any) -> None:
    text = "".join(bits)
    read = Read([text], thinking=thinking, parallel=parallel)
    assert DSML not in read.content and DSML not in read.reasoning
    assert "<think>" not in read.content and "</think>" not in read.content
    assert parallel or len(read.calls) <= 1
    assert all(name in ("f", "g") for _, name, _ in read.calls)
    for _, _, arguments in read.calls[:-1]:  # a value has all up to its own end, so the last call may stay open
        assert isinstance(json.loads(arguments, parse_constant=lambda name: 1 / 0), dict)
    if data is not None:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
        chunks = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        assert Read(chunks, thinking=thinking, parallel=parallel).all == read.all
    single = Read(list(text), thinking=thinking, parallel=parallel)
    assert single.all == read.all


_PLAIN = st.text(st.sampled_from("ab \n<>/\"'\\{}[]:,é猫🙂\u2028|｜_0"), max_size=30)
# at the very end this can only be the begin of a tag that was cut off
_ENDED = _PLAIN.filter(lambda text: not text.endswith("</｜"))
_FLOATS = st.floats(allow_nan=False, allow_infinity=False)
_VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | _PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_PLAIN, inner, max_size=3),
    max_leaves=6,
)
_KEY = st.text(st.sampled_from('ab_ é>="'), min_size=1, max_size=6).filter(lambda key: '">' not in '"' + key)
_CALLS = st.lists(st.tuples(st.sampled_from("fg"), st.dictionaries(_KEY, _VALUE, max_size=4)), max_size=3)


@settings(max_examples=500, deadline=None)
@given(reasoning=st.none() | _PLAIN, content=_ENDED, made=_CALLS, data=st.data())
def test_a_turn_that_is_rendered_reads_as_it_was(reasoning: str | None, content: str, made: Any, data: Any) -> None:
    calls = tuple(ToolCall(f"c{i}", name, dumps(arguments)) for i, (name, arguments) in enumerate(made))
    thinking = reasoning is not None
    style = Style(thinking, functions=({"name": "f"}, {"name": "g"}))
    turns = [Assistant(content, reasoning, calls)]
    whole = PlainEncoding().spell(turns, style).text
    text = whole[whole.index(ASSISTANT) + len(ASSISTANT) : whole.index(EOS)]
    text = text.removeprefix(THINK if thinking else END_THINK)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    read = Read([text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])], thinking=thinking)
    assert (read.reasoning, read.content) == (reasoning or "", content)
    assert [(name, json.loads(arguments)) for _, name, arguments in read.calls] == [
        (name, json.loads(dumps(arguments))) for name, arguments in made
    ]
