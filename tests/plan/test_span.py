"""Spans: any regular order of channels is found, written and read back; others have none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normconv.plan import Span

spans = st.builds(
    lambda start, size, inner, outer: Span(start, start + size, inner, outer),
    st.integers(0, 9),
    st.integers(2, 6),
    st.integers(1, 5),
    st.integers(1, 4),
)


@given(spans)
def test_a_span_is_found_from_its_channels_and_survives_text(span: Span) -> None:
    assert len(span.channels) == span.features
    assert Span.of(span.channels) == span
    assert Span.read(str(span)) == span


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8).map(tuple))
def test_what_is_found_is_never_wrong(channels: tuple[int, ...]) -> None:
    span = Span.of(channels)
    assert span is None or span.channels == channels


@pytest.mark.parametrize(
    "text", ["", "4", "4:4", "6:4", "0*0:4", "0:4*0", "-1:4", "0:4*2*3", "a:b"]
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="span"):
        Span.read(text)
