"""What ``manage.py seed_demo`` creates."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Account:
    """A sample account."""

    name: str
    password: str
    role: str
    staff: bool = False


ACCOUNTS = [
    Account("ada", "ada-demo", "a user"),
    Account("grace", "grace-demo", "another user"),
    Account("reviewer", "reviewer-demo", "staff: reads all conversations under /admin/", staff=True),
]

ISO_DATE = r"""Match the shape with a pattern and leave the calendar to `date`, which knows about leap years:

```python
import re
from datetime import date

SHAPE = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)


def is_iso_date(text: str) -> bool:
    if SHAPE.fullmatch(text) is None:
        return False
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True
```

- `fullmatch` refuses anything before or after the date.
- `re.ASCII` keeps out digits of other scripts, such as `٣`.
- `2023-02-29` has the right shape, yet **no such day exists**: `fromisoformat` says so."""

ISO_DATE_TESTS = """Here are the cases that I would not leave out:

| Text         | Date? | Why                    |
| ------------ | :---: | ---------------------- |
| `2024-02-29` |  ✅   | a leap year            |
| `2023-02-29` |  ❌   | not a leap year        |
| `2024-13-01` |  ❌   | there is no month 13   |
| `2024-1-1`   |  ❌   | the zeros are missing  |
| ` 2024-01-01`|  ❌   | a space comes first    |

```python
@pytest.mark.parametrize("text", ["2023-02-29", "2024-13-01", "2024-1-1", " 2024-01-01"])
def test_what_is_no_date_is_refused(text: str) -> None:
    assert not is_iso_date(text)
```"""

GREETINGS = """Gladly! 👋

1. **Portuguese** – *Olá, tudo bem?*
2. **Japanese** – こんにちは、お元気ですか。
3. **Arabic** – مرحبًا، كيف حالك؟
4. **Hindi** – नमस्ते, आप कैसे हैं?
5. **Greek** – Γεια σου, τι κάνεις;

> A small tip: in Japanese the question is rather formal; friends say 元気？ 😊"""

LISBON = """### Two easy days in Lisbon 🇵🇹

**Day one: the old hills**
- Morning: ride tram 28 early, before the queue, and walk down through *Alfama* 🚋
- Noon: grilled sardines 🐟 in a side street, never on the main square
- Evening: the view from *Senhora do Monte* 🌇

**Day two: the river**
- Morning: *Belém*, the tower and the monastery
- Noon: warm custard tarts 🥧, with cinnamon
- Evening: fado in a small house, booked ahead 🎶

Wear shoes with a good grip: the paving stones are polished by two centuries of feet."""

COMPILER = """Think of a recipe in a language that your cook does not read.

- An **interpreter** stands in the kitchen and translates each line as it is cooked.
- A **compiler** translates the whole book *first*, and only then does cooking begin.

So a compiler can look ahead: it sees that the oven is needed at step 9 and has it heated at step 1. That is what
we call *optimising*. The price is the wait before the first dish."""

CONVERSATIONS: dict[str, dict[str, list[tuple[str, str]]]] = {
    "ada": {
        "Greetings of the world": [("How do I say “hello, how are you?” in five languages?", GREETINGS)],
        "Is it an ISO date?": [
            ("Write a Python function that tells whether a text is an ISO date.", ISO_DATE),
            ("Which cases should its tests cover?", ISO_DATE_TESTS),
        ],
    },
    "grace": {
        "What a compiler does": [("Explain to a child what a compiler does.", COMPILER)],
        "Two days in Lisbon": [("I have two days in Lisbon. What should I do?", LISBON)],
    },
}
