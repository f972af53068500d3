"""Short conversations of this package for role shares: several turns and speakers, pasted documents."""

from __future__ import annotations

from pathlib import Path


def neutral_chats() -> list[list[dict[str, str]]]:
    """Ten short conversations with system, user and assistant turns; in six of them the user pastes a text.

    ```python
    >>> [message["role"] for message in neutral_chats()[0]]
    ['system', 'user', 'assistant', 'user', 'assistant']

    ```
    """
    import yaml

    text = Path(__file__).with_name("neutral_chats.yaml").read_text(encoding="utf-8")
    return [
        [{"role": role, "content": content.strip()} for turn in chat for role, content in turn.items()]
        for chat in yaml.safe_load(text)
    ]


__all__ = ["neutral_chats"]
