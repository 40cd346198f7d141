"""Functions that judge answers, good and bad."""

import os
import time

calls = 0


def words(text, row):
    """The share of the row's words that the answer has."""
    asked = row["answer"].split()
    return sum(word in text.split() for word in asked) / len(asked)


def right(text, row):
    return text == row["answer"]


def later(text, row):
    """Right or wrong, and after SSLR1_TEST_CALLS calls whatever SSLR1_TEST_RETURNS says."""
    global calls
    calls += 1
    if calls > int(os.environ.get("SSLR1_TEST_CALLS", 1 << 60)):
        returned = os.environ["SSLR1_TEST_RETURNS"]
        if returned == "error":
            raise ZeroDivisionError("no such thing\nas that")
        return float(returned)
    return float(text == row["answer"])


def raises(text, row):
    raise KeyError("colour")


def leaves(text, row):
    raise SystemExit(0)


def nan(text, row):
    return float("nan")


def two(text, row):
    return 2


def nothing(text, row):
    return None


def sleeps(text, row):
    time.sleep(60)


number = 3
