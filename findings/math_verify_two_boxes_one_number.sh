#!/usr/bin/env bash
# math-verify 0.9.0 (latex2sympy2_extended 1.11.0): an answer that is boxed, and then corrected in a second box, may be read as one number.
# Two different boxes, not set in dollar signs, count as one answer if fewer than ten characters stand between them, or fewer than
# seventy with a comma, a semicolon, "and" or "or" among them. Their contents are joined by a comma. If the second has three digits, that
# comma is taken as a thousands separator: 90 and 180 make 90180. Else they make a set. Either way the right last answer is wrong. With a
# full stop in place of the comma, or with more words between them, the last box counts alone.
# Why it surprises: whether a corrected answer is right depends on a comma in the sentence, and the number compared was never written.
# Whom it concerns: rewards and benchmarks by math-verify (TRL's accuracy_reward calls it), where a model that checks itself boxes twice.
# Exits 0 while this is so.
set -euo pipefail
home=$(mktemp -d); trap 'rm -rf "$home"' EXIT
"${PYTHON:-python3}" -m venv "$home/venv"
"$home/venv/bin/pip" install -q --disable-pip-version-check "math-verify==0.9.0" "latex2sympy2_extended==1.11.0" >&2
HOME=$home "$home/venv/bin/python" - <<'EOF'
import sys

from math_verify import parse, verify

answers = {
    r"It is \boxed{90}. No: it is \boxed{180}.": 180,
    r"It is \boxed{90}, no, it is \boxed{180}.": 180,
    r"It is \boxed{90}, no, it is \boxed{45}.": 45,
    r"Perhaps \boxed{90}, but the sky is on the left, so it is \boxed{180}.": 180,
    r"Perhaps \boxed{90}, but the sky is on the left and the ground on the right, so that is wrong: it is \boxed{180}.": 180,
}
found = []
for answer, last in answers.items():
    read = parse(answer)
    found.append((verify(parse(str(last)), read), verify(parse("90180"), read)))
    print(f"{answer}\n    read as {read[0]}; {last}: {found[-1][0]}; 90180: {found[-1][1]}")
sys.exit(found != [(True, False), (False, True), (False, False), (False, True), (True, False)])
EOF
