"""How fast completions are graded: `python tests/bench_grader.py`. Not a test; run it on an otherwise idle machine.

The aims: 100 trivial completions a second on two cores with the full sandbox, 15 times the rate of one `python -c` for
each, 128 completions of the embedded model's kind in under 1.5 s, and an endless loop that costs its limit and delays
no one else.
"""
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import env_leetcode as env  # noqa: E402

CODE = "class Solution:\n    def solve(self, xs):\n        return sum(x * x for x in xs if x % 2 == 0)\n"
STARRED = "typing functools collections itertools heapq bisect string operator math".split()
SETUP = "import random, functools, collections, string, math, datetime\n" + "".join(
    f"from {module} import *\n" for module in STARRED)
INPUTS = [list(range(i, i + n)) for n in range(6) for i in (-3, 2)]
ROW = {
    "id": 1, "func_name": "solve", "setup_code": SETUP, "canonical_solution": CODE,
    "prompt": [{"role": "user", "content": "Write solve and should pass all tests."}],
    "gt_answer": [f"assert Solution().solve({xs}) == {sum(x * x for x in xs if x % 2 == 0)}" for xs in INPUTS]}


def answers(code: str, n: int) -> list[str]:
    """The code n times, numbered: equal completions would be graded once."""
    return [f"```python\n# {i}\n{code}```" for i in range(n)]


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
    env.grade_batch([problem] * 32, answers(CODE, 32))  # start the zygotes

    taken, each = [], []
    for _ in range(5):  # in turns, so that both meet the same load; medians
        taken.append(seconds(lambda: env.grade_batch([problem] * 200, answers(CODE, 200))))
        command = [sys.executable, "-c", f"{SETUP}{CODE}assert Solution().solve([1, 2]) == 4"]
        each += [seconds(lambda: subprocess.run(command, check=True)) for _ in range(5)]
    rate, python = 200 / sorted(taken)[2], 1 / sorted(each)[12]
    print(f"trivial completions, {len(INPUTS)} tests each: {rate:.0f} a second; one `python -c` for each, one after "
          f"another: {python:.0f} a second, so the ratio is {rate / python:.1f}")

    problems = [env.with_mode(problem, env.DEFAULT_MODES[i // 8 % 4]) for i in range(128)]
    right, wrong = answers(CODE, 128), answers(CODE.replace("% 2 == 0", "> 0"), 128)
    mixed = [wrong[i] if i % 2 else right[i] if i % 8 else env.exploit(p, p.mode) for i, p in enumerate(problems)]
    taken = sorted(seconds(lambda: env.grade_batch(problems, mixed)) for _ in range(5))
    print(f"128 of the embedded model's kind (16 groups, right, wrong and cheating): median {taken[2]:.2f} s, worst "
          f"{taken[-1]:.2f} s")

    ends, grade, start = [], env.grade, time.perf_counter()

    def timed(p: env.Problem, completion: str) -> env.Verdict:
        verdict = grade(p, completion)
        ends.append(time.perf_counter() - start)
        return verdict

    env.grade = timed
    loop = answers("class Solution:\n    def solve(self, xs):\n        while True: pass\n", 1)
    verdicts = env.grade_batch([problem] * 128, loop + answers(CODE, 127))
    print(f"with an endless loop among 128: the other 127 are done after {sorted(ends)[-2]:.2f} s, the loop after "
          f"{max(ends):.2f} s ({verdicts[0].note})")


if __name__ == "__main__":
    main()
