"""The page about the machine is the doctor's."""

from __future__ import annotations

from sdlora_ui.machine_view import machine_html, page_html


def test_what_is_missing_stands_with_its_commands() -> None:
    answer = {
        "rows": [
            {"topic": "torch", "value": "2.13.0+cpu, built <without> CUDA", "good": None, "remedies": []},
            {
                "topic": "card",
                "value": "lies idle",
                "good": False,
                "remedies": ["pip uninstall -y torch", "a & b"],
            },
        ]
    }
    html = page_html(answer)
    assert "built &lt;without&gt; CUDA" in html
    assert (
        "<td>problem</td><td>lies idle<br><code>pip uninstall -y torch</code><br><code>a &amp; b</code></td>"
        in html
    )


def test_this_machine_is_shown() -> None:
    html = machine_html()
    assert html.count("<tr>") >= 8
    assert "training.device: " in html
