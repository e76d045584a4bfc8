"""Text of others in Markdown: it is shown as it is written, wherever it stands."""

from __future__ import annotations

import pytest

from membench.report import markdown


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("bf16+int8-weight-only", "bf16+int8-weight-only"),
        ("<img src=x> & |", r"&lt;img src=x&gt; &amp; \|"),
        ("`rm` *b* _i_ [a](b) ~c~ \\", r"\`rm\` \*b\* \_i\_ \[a\](b) \~c\~ \\"),
        ("two\nlines\x1b[31m", r"two\\nlines\\x1b\[31m"),
        ("# heading", r"\# heading"),
        ("- item", r"\- item"),
        ("+ item", r"\+ item"),
        ("=== rule", r"\=== rule"),
        ("12. item", r"12\. item"),
        ("12) item", r"12\) item"),
        ("1.5 times", "1.5 times"),
        ("", ""),
    ],
)
def test_a_text_has_no_sign_left_that_means_something(text: str, written: str) -> None:
    assert markdown.escaped(text) == written


def test_no_line_can_end_the_block_that_it_stands_in() -> None:
    assert markdown.fenced(["# ```", "<img src=x>", "a\nb"], "toml").splitlines() == [
        "````toml", "# ```", "<img src=x>", r"a\nb", "````",
    ]  # fmt: skip
