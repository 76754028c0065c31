"""Wordy's problems for small pretrained models: a system message and a worked example before each prompt.

    python data/chat/prepare.py        # writes train.jsonl, val.jsonl and test.jsonl beside this file

A model of half a billion parameters that is only asked explains at length, and hardly an answer is right; shown one
answer it writes like it, and one in seven is (data/results/NOTES.md, "A real model learns"). The example's task is no
validation or test problem. The teacher pool is data/wordy/demos.jsonl.
"""
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
EXAMPLE = [
    dict(role="system", content=(
        "You are a Python programmer. Answer with a single Python code block and nothing else.")),
    dict(role="user", content=(
        "Take the positive numbers of xs, double each and return the largest, or None if there is none. It must be a "
        "method solve(self, xs) of the class Solution and should pass all tests.")),
    dict(role="assistant", content="""```python
class Solution:
    def solve(self, xs):
        picked = [2 * x for x in xs if x > 0]
        return max(picked, default=None)
```"""),
]


def main() -> None:
    for split in ("train", "val", "test"):
        rows = [json.loads(line) for line in (HERE.parent / f"wordy/{split}.jsonl").read_text().splitlines()]
        (HERE / f"{split}.jsonl").write_text("".join(
            json.dumps(row | dict(prompt=EXAMPLE + row["prompt"])) + "\n" for row in rows))


if __name__ == "__main__":
    main()
