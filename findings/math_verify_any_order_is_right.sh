#!/usr/bin/env bash
# math-verify 0.9.0 (latex2sympy2_extended 1.11.0): an order of tiles, boxed without brackets, is right in every order.
# \boxed{2, 1, 4, 3} is read as a set, so all 24 orders of four verify against it. Without commas the numbers are added up: \boxed{2 1 4 3}
# is 10, all 24 orders verify again, \boxed{3 4} verifies against 7, and a point \boxed{25 75} against 100. The order counts only in
# brackets, (2, 1, 4, 3) or [2, 1, 4, 3], on both sides; brackets around the answer only don't help.
# Why it surprises: such a reward is 1 for every well-formed answer, so its mean rises while nothing but the form is learnt;
# and nobody writes a space between two numbers for a sum.
# Whom it concerns: jigsaw, sorting and pointing tasks rewarded by math-verify (TRL's accuracy_reward calls it).
# Exits 0 while this is so.
set -euo pipefail
home=$(mktemp -d); trap 'rm -rf "$home"' EXIT
"${PYTHON:-python3}" -m venv "$home/venv"
"$home/venv/bin/pip" install -q --disable-pip-version-check "math-verify==0.9.0" "latex2sympy2_extended==1.11.0" >&2
HOME=$home "$home/venv/bin/python" - <<'EOF'
import sys
from itertools import permutations

from math_verify import parse, verify


def boxed(text):
    return parse(rf"\boxed{{{text}}}")


found = []
for gold, form, joint in [
    ("2, 1, 4, 3", "{}", ", "),
    ("2 1 4 3", "{}", " "),
    ("2, 1, 4, 3", "({})", ", "),
    ("(2, 1, 4, 3)", "({})", ", "),
    ("[2, 1, 4, 3]", "[{}]", ", "),
]:
    read = boxed(gold)
    right = sum(verify(read, boxed(form.format(joint.join(order)))) for order in permutations("1234"))
    found.append(right)
    print(f"truth {gold} is read as {read[0]}; of the 24 orders, written as {form.format(joint.join('1234'))}, {right} verify")
for gold, answer in [("7", "3 4"), ("100", "25 75")]:
    found.append(verify(boxed(gold), boxed(answer)))
    print(f"truth {gold}, answer {answer}: {found[-1]}")
sys.exit(found != [24, 24, 24, 1, 1, True, True])
EOF
