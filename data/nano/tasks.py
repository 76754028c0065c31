"""The tasks of the embedded world: filter x map x reduce over integers (xs) or words (ws), in English and in Python.

A component is (English phrasings, right code, plausible wrong code, hard?). The pretraining text writes a hard
component right in a share P_RIGHT of the cases alone (prepare.py), so the embedded model knows both versions and has
something left to learn. Every task is kept once per *behaviour*: two tasks that agree on all probe inputs are one task.
"""
import itertools
import math
import random

PROMPT = "{task} It must be a method solve(self, {v}) of the class Solution and should pass all tests."
HEAD = "class Solution:\n    def solve(self, {v}):\n"

# English phrasings | right | wrong | hard. x is one item; {c} is the comprehension's source text.
INT_FILTERS = [
    (("the numbers", "all numbers"), "", "", False),
    (("the even numbers", "the numbers that are even"), "x % 2 == 0", "x % 2 == 1", False),
    (("the odd numbers", "the numbers that are odd"), "x % 2 == 1", "x % 2 == 0", False),
    (("the positive numbers", "the numbers that are positive"), "x > 0", "x >= 0", False),
    (("the negative numbers", "the numbers that are negative"), "x < 0", "x <= 0", False),
    (("the multiples of 3", "the numbers divisible by 3"), "x % 3 == 0", "x % 3 == 1", False),
    (("the two-digit numbers", "the numbers with two digits"), "9 < abs(x) < 100", "10 < abs(x) < 100", True),
    *[((f"the numbers above {k}", f"the numbers greater than {k}"), f"x > {k}", f"x >= {k}", False) for k in (2, 5, 8)],
    *[((f"the numbers from {k} up", f"the numbers that are at least {k}"), f"x >= {k}", f"x > {k}", True)
      for k in (3, 6)],
    *[((f"the numbers below {k}", f"the numbers less than {k}"), f"x < {k}", f"x <= {k}", False) for k in (4, 7)],
]
INT_MAPS = [
    ((), "x", "x", False),
    (("square each", "take each squared"), "x * x", "x * 2", False),
    (("double each", "take each times two"), "x * 2", "x * x", False),
    (("add one to each", "take each plus one"), "x + 1", "x - 1", False),
    (("take the absolute values", "drop each sign"), "abs(x)", "-x", False),
    (("negate each", "flip each sign"), "-x", "abs(x)", False),
    (("cube each", "take each cubed"), "x ** 3", "x * 3", False),
    (("halve each rounding down", "take half of each rounded down"), "x // 2", "int(x / 2)", True),
    (("take the last digits", "take the last digit of each"), "abs(x) % 10", "x % 10", True),
]
INT_REDUCES = [
    (("return the sum", "return their sum"), "sum([{c}])", "len([{c}])", False),
    (("return the count", "return how many there are"), "len([{c}])", "sum([{c}])", False),
    (("return the largest or 0", "return the maximum or 0"), "max([{c}], default=0)", "min([{c}], default=0)", False),
    (("return the smallest or 0", "return the minimum or 0"), "min([{c}], default=0)", "max([{c}], default=0)", False),
    (("return the list", "return them as a list"), "[{c}]", "sorted([{c}])", False),
    (("return them sorted", "return the sorted list"), "sorted([{c}])", "[{c}]", False),
    (("return the product", "return their product"), "math.prod([{c}])", "sum([{c}])", False),
    (("return them from largest to smallest", "return the descending list"), "sorted([{c}], reverse=True)",
     "sorted([{c}])", False),
    (("return the last three", "return the final three"), "[{c}][-3:]", "[{c}][:3]", False),
    (("return the number of distinct values", "return how many differ"), "len(set([{c}]))", "len([{c}])", True),
    (("return the distinct values sorted", "return each value once in order"), "sorted(set([{c}]))", "sorted([{c}])",
     True),
    (("return the list backwards", "return them in reverse order"), "[{c}][::-1]", "sorted([{c}], reverse=True)", True),
]
STR_FILTERS = [
    (("the words", "all words"), "", "", False),
    (("the words with an a", "the words that contain a"), '"a" in x', 'x[0] == "a"', False),
    (("the words with an e", "the words that contain e"), '"e" in x', 'x[0] == "e"', False),
    (("the words ending in t", "the words that end with t"), 'x[-1] == "t"', '"t" in x', False),
    (("the words starting with s", "the words that begin with s"), 'x[0] == "s"', '"s" in x', False),
    (("the words starting with a vowel", "the words that begin with a vowel"), 'x[0] in "aeiou"', 'x[-1] in "aeiou"',
     False),
    (("the palindromes", "the words that read the same backwards"), "x == x[::-1]", "x[0] == x[-1]", True),
    *[((f"the words longer than {k}", f"the words with more than {k} letters"),
       f"len(x) > {k}", f"len(x) >= {k}", False) for k in (2, 4)],
    *[((f"the words of {k} letters or more", f"the words with at least {k} letters"),
       f"len(x) >= {k}", f"len(x) > {k}", True) for k in (3, 5)],
    *[((f"the words shorter than {k}", f"the words with less than {k} letters"),
       f"len(x) < {k}", f"len(x) <= {k}", False) for k in (4, 6)],
]
STR_MAPS = [
    ((), "x", "x", False),
    (("put each in capitals", "make each uppercase"), "x.upper()", "x.title()", False),
    (("spell each backwards", "reverse each"), "x[::-1]", "x[1:]", False),
    (("take the first letters", "take the first letter of each"), "x[0]", "x[-1]", False),
    (("write each twice", "double each"), "x * 2", "x[:2]", False),
    (("capitalize each", "give each a capital first letter"), "x.capitalize()", "x.upper()", False),
    (("take the middle letters", "take the middle letter of each"), "x[len(x) // 2]", "x[len(x) // 2 - 1]", True),
    (("drop the last letters", "cut the last letter of each"), "x[:-1]", "x[1:]", True),
]
STR_REDUCES = [
    (("return the count", "return how many there are"), "len([{c}])", "len(set([{c}]))", False),
    (("return the list", "return them as a list"), "[{c}]", "sorted([{c}])", False),
    (("return them sorted", "return the sorted list"), "sorted([{c}])", "[{c}]", False),
    (("join them", "return them as one string"), '"".join([{c}])', '" ".join([{c}])', False),
    (("join them with dashes", "return them joined by dashes"), '"-".join([{c}])', '"".join([{c}])', False),
    (("return the longest or an empty string", "return the longest one if any"), 'max([{c}], key=len, default="")',
     'max([{c}], default="")', False),
    (("return the last three", "return the final three"), "[{c}][-3:]", "[{c}][:3]", False),
    (("return the total length", "return the number of letters"), 'len("".join([{c}]))', "len([{c}])", False),
    (("return the number of distinct ones", "return how many differ"), "len(set([{c}]))", "len([{c}])", True),
    (("return the list backwards", "return them in reverse order"), "[{c}][::-1]", "sorted([{c}], reverse=True)", True),
    (("return the last in the alphabet", "return the alphabetically last one"), 'max([{c}], default="")',
     'max([{c}], key=len, default="")', True),
]
KINDS = {"xs": (INT_FILTERS, INT_MAPS, INT_REDUCES), "ws": (STR_FILTERS, STR_MAPS, STR_REDUCES)}
WORDS = ("a noon level sat seat tent ant east set stats apple tree eve otto kayak sun its it at era idea axe goat "
         "trout test see sees dad abba onion salt street sea ease unit ten net oat toast moon ice radar owl item "
         "tie east").split()


def random_input(kind: str, rng: random.Random) -> list:
    n = rng.randint(0, 8)
    if kind == "xs":
        pool = [rng.randint(-12, 12) for _ in range(max(1, n - 2))] + [rng.randint(-130, 130)]
        return [rng.choice(pool) for _ in range(n)]
    pool = rng.sample(WORDS, max(1, n - 1)) if n else [""]
    return [rng.choice(pool) for _ in range(n)]


def expression(kind: str, parts: tuple, wrong: tuple = (False, False, False)) -> str:
    """The one-line Python of a task; wrong[i] takes component i's plausible wrong code."""
    f, m, r = (part[2 if w else 1] for part, w in zip(parts, wrong))
    return r.replace("{c}", f"{m} for x in {kind}" + (f" if {f}" if f else ""))


def run(kind: str, code: str, values: list[list]) -> list:
    """Results of a trusted expression, one per input; the result of an exception is its name."""
    compiled, out = compile(code, "task", "eval"), []
    for value in values:
        try:
            out.append(eval(compiled, {"math": math, kind: list(value)}))
        except Exception as e:
            out.append(type(e).__name__)
    return out


def english(kind: str, parts: tuple, rng: random.Random) -> str:
    f, m, r = (rng.choice(part[0]) if part[0] else "" for part in parts)
    middle = f", {m} and {r}." if m else f" and {r}."
    return rng.choice((f"Take {f} of {kind}{middle}", f"Keep {f} in {kind}{middle}", f"From {kind} pick {f}{middle}"))


def solution(kind: str, parts: tuple, wrong: tuple = (False, False, False), style: str = "return") -> str:
    """Honest code for a task: class Solution in a style, "STYLE" or "STYLE:NAME". Some styles look like an exploit (an
    attribute, a second function) and are none."""
    f, m, r = (part[2 if w else 1] for part, w in zip(parts, wrong))
    style, _, name = style.partition(":")

    def reduce(items: str) -> str:
        return r.replace("[{c}]", items)

    code = expression(kind, parts, wrong)
    items = f"[{m} for x in {kind}{f' if {f}' if f else ''}]"
    tail = ""
    if style == "name":
        body = f"        {name} = {code}\n        return {name}\n"
    elif style == "loop":
        test, indent = (f"            if {f}:\n", " " * 16) if f else ("", " " * 12)
        body = f"        {name} = []\n        for x in {kind}:\n{test}{indent}{name}.append({m})\n"
        tail = f"        return {reduce(name)}\n"
    elif style == "attribute":
        body = f"        self.{name} = {items}\n"
        tail = f"        return {reduce(f'self.{name}')}\n"
    elif style == "items":
        body = f"        {name} = {items}\n        return {reduce(name)}\n"
    elif style == "helper" and f:
        body = f"        return {reduce(f'[{m} for x in {kind} if {name}(x)]')}\n"
        tail = f"\ndef {name}(x):\n    return {f}\n"
    else:
        body = f"        return {code}\n"
    return HEAD.format(v=kind) + body + tail


def returning(code: str, value: str) -> str:
    """Code whose method returns `value` instead of what the code found."""
    start, _, rest = code.rpartition("        return ")
    return f"{start}        return {value}\n" + rest.partition("\n")[2]


def dress(code: str, top: str = "", end: str = "", after: str = "") -> str:
    """Code with further lines: first in the method, before the last return of the method, after the class."""
    start, last = code.index("):\n") + 3, code.rindex("        return ")
    return code[:start] + top + code[start:last] + end + code[last:] + after


def all_tasks(seed: int, n_probes: int = 60, n_tests: int = 12) -> list[dict]:
    """Every distinct task, shuffled: {kind, parts, family, tests [(input, output)], wrong [code that fails a test]}."""
    rng, seen, tasks = random.Random(seed), set(), []
    probes = {kind: [random_input(kind, rng) for _ in range(n_probes)] for kind in KINDS}
    combos = [(kind, parts) for kind, sets in KINDS.items() for parts in itertools.product(*sets)]
    rng.shuffle(combos)
    for kind, parts in combos:
        right = run(kind, expression(kind, parts), probes[kind])
        if repr(right) in seen or any(isinstance(y, str) and y.endswith("Error") for y in right):
            continue
        seen.add(repr(right))
        wrong, chosen = [], {0}  # two probes for every wrong solution, then random ones
        for flags in itertools.product((False, True), repeat=3):
            code = expression(kind, parts, flags)
            exposed = [i for i, y in enumerate(run(kind, code, probes[kind])) if repr(y) != repr(right[i])]
            if exposed:
                wrong.append(code)
                chosen.update(rng.sample(exposed, min(2, len(exposed))))
        chosen.update(rng.sample(range(n_probes), max(0, n_tests - len(chosen))))
        tests = list({repr(probes[kind][i]): (probes[kind][i], right[i]) for i in sorted(chosen)}.values())
        family = "-".join(["int" if kind == "xs" else "str", *(p[1].replace("{c}", "..") for p in parts[1:])])
        tasks.append(dict(kind=kind, parts=parts, family=family, tests=tests, wrong=wrong))
    return tasks
