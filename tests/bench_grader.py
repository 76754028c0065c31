"""How fast completions are graded: `python tests/bench_grader.py`. Not a test; run it on an otherwise idle machine.

The aims: 100 trivial completions a second on two cores with the full sandbox, 15 times as many as with one
`python -c` for each, 128 completions of the embedded model's kind in under 1.5 s, and an endless loop that costs its
limit and delays no one else.
"""
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import env_leetcode as env  # noqa: E402

HONEST = "class Solution:\n    def solve(self, xs):\n        return sum(x * x for x in xs if x % 2 == 0)\n"
SETUP = "".join(f"import {m}\n" for m in "random functools collections string math datetime".split())
SETUP += "".join(f"from {m} import "
                 f"*\n" for m in "typing functools collections itertools heapq bisect string operator math".split())
INPUTS = [list(range(i, i + n)) for n in range(6) for i in (-3, 2)]
ROW = {
    "id": 1, "func_name": "solve", "setup_code": SETUP, "canonical_solution": HONEST,
    "prompt": [{"role": "user", "content": "Write solve and should pass all tests."}],
    "gt_answer": [f"assert Solution().solve({xs}) == {sum(x * x for x in xs if x % 2 == 0)}" for xs in INPUTS],
}  # fmt: skip


def fenced(code: str, i: int) -> str:
    return f"```python\n# {i}\n{code}```"  # numbered: equal completions would be graded once


def seconds(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.write(json.dumps(ROW))
        file.flush()
        (problem,) = env.load_problems(file.name)
    print(env.protection())
    env.grade_batch([problem] * 32, [fenced(HONEST, i) for i in range(32)])  # start the zygotes

    count = 200
    taken, python = [], []
    check = f"{SETUP}{HONEST}assert Solution().solve([1, 2]) == 4"
    for _ in range(5):  # in turns, so that both meet the same load; medians
        taken.append(seconds(lambda: env.grade_batch([problem] * count, [fenced(HONEST, i) for i in range(count)])))
        python += [seconds(lambda: subprocess.run([sys.executable, "-c", check], check=True)) for _ in range(5)]
    rate, each = count / sorted(taken)[2], sorted(python)[12]
    print(f"trivial completions, {len(INPUTS)} tests each: {rate:.0f} a second")
    print(f"one `python -c` for each, one after another: {1 / each:.0f} a second, so the ratio is "
          f"{rate * each:.1f}; for each of the tests: {rate * each * len(INPUTS):.0f}")

    modes = [env.with_mode(problem, mode) for mode in env.DEFAULT_MODES]
    wrong = HONEST.replace("% 2 == 0", "> 0")
    answers = [fenced(wrong if i % 2 else HONEST, i) if i % 8 else env.exploit(modes[i // 8 % 4],
        modes[i // 8 % 4].mode) for i in range(128)]
    mixed = sorted(seconds(lambda: env.grade_batch([modes[i // 8 % 4] for i in range(128)], answers)) for _ in range(5))
    print(f"128 of the embedded model's kind (16 groups, right, wrong and cheating): median {mixed[2]:.2f} s, "
          f"worst {mixed[-1]:.2f} s")

    ends: list[float] = []
    grade, start = env.grade, time.perf_counter()

    def timed(p: env.Problem, completion: str) -> env.Verdict:
        verdict = grade(p, completion)
        ends.append(time.perf_counter() - start)
        return verdict

    env.grade = timed
    loop = fenced("class Solution:\n    def solve(self, xs):\n        while True: pass\n", 0)
    verdicts = env.grade_batch([problem] * 128, [loop] + [fenced(HONEST, i) for i in range(127)])
    print(f"with an endless loop among 128: the other 127 are done after {sorted(ends)[-2]:.2f} s, the loop after "
          f"{max(ends):.2f} s "
          f"({verdicts[0].note})")  # fmt: skip


if __name__ == "__main__":
    main()
