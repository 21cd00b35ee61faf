"""Asks a model questions through the engine behind `llamafactory-cli chat`.

Run as `python -m quickstart_steps.ask --arguments FILE --out FILE --question TEXT ...`; the arguments are a chat
recipe's.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from llamafactory.chat import ChatModel

MAX_ANSWER_TOKENS = 20


def main(arguments: list[str] | None = None) -> int:
    """Command line of this step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arguments", type=Path, required=True, help="a JSON file")
    parser.add_argument("--question", nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    chat_model = ChatModel(json.loads(options.arguments.read_text()))
    answers = []
    for question in options.question:
        messages = [{"role": "user", "content": question}]
        (response,) = chat_model.chat(messages, do_sample=False, max_new_tokens=MAX_ANSWER_TOKENS)
        answers.append({"question": question, "answer": response.response_text})
    options.out.write_text(json.dumps(answers) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
