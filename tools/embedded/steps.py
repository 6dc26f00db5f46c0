"""The steps that a generated problem is made of, as data.

A step takes a value of one kind and gives one of another. Its `code` is an expression, or lines that assign to {out}; its
first phrase is what a thought calls it, and every phrase is a way in which a docstring may ask for it. Placeholders: {v} the
value, {out} the result, {n} a number, {m} a larger number, {k} a small count, {a} and {b} letters, {p} a separator.
"""

from __future__ import annotations

from dataclasses import dataclass

KINDS = {"list": "a list of integers", "text": "a string", "words": "a list of words", "number": "an integer"}


@dataclass(frozen=True)
class Step:
    """takes, gives  "list", "text", "words", "number", "counts" (a dictionary with integer values) or "truth" (bool).
    first        only sensible on the function's own argument, which is small; later values may be huge.
    divisor      {n} divides, so it is never the function's second argument's zero; kept within 2 to 9.
    """

    name: str
    takes: str
    gives: str
    code: str
    phrases: tuple[str, ...]
    first: bool = False
    divisor: bool = False

    @property
    def is_block(self) -> bool:
        return "{out}" in self.code


def _keep(name: str, condition: str, *phrases: str, divisor: bool = False) -> Step:
    return Step(f"keep_{name}", "list", "list", f"[x for x in {{v}} if {condition}]", phrases, divisor=divisor)


def _each(name: str, value: str, *phrases: str, divisor: bool = False) -> Step:
    return Step(f"each_{name}", "list", "list", f"[{value} for x in {{v}}]", phrases, divisor=divisor)


def _step(name: str, kinds: str, code: str, *phrases: str, first: bool = False, divisor: bool = False) -> Step:
    takes, gives = kinds.split(">")
    return Step(name, takes, gives, code, phrases, first, divisor)


def _letters(name: str, condition: str, *phrases: str) -> Step:
    return Step(f"letters_{name}", "text", "text", f"''.join(c for c in {{v}} if {condition})", phrases)


def _words(name: str, condition: str, *phrases: str) -> Step:
    return Step(f"words_{name}", "words", "words", f"[w for w in {{v}} if {condition}]", phrases)


STEPS = (
    # integers of a list, kept or changed one by one
    _keep("even", "x % 2 == 0", "keep the even numbers", "drop all odd values", "remove numbers that are not even"),
    _keep("odd", "x % 2 == 1", "keep the odd numbers", "drop all even values", "remove numbers that are not odd"),
    _keep("above", "x > {n}", "keep numbers above {n}", "retain only values greater than {n}"),
    _keep("below", "x < {n}", "keep numbers below {n}", "retain only values less than {n}"),
    _keep("least", "x >= {n}", "keep numbers of at least {n}", "discard values smaller than {n}"),
    _keep("most", "x <= {n}", "keep numbers of at most {n}", "discard values larger than {n}"),
    _keep("multiple", "x % {n} == 0", "keep multiples of {n}", "retain what {n} divides", divisor=True),
    _keep("other", "x % {n} != 0", "remove multiples of {n}", "discard what {n} divides", divisor=True),
    _keep("not", "x != {n}", "remove every {n}", "discard elements equal to {n}"),
    _keep("positive", "x > 0", "keep the positive numbers", "discard zeros and negative values"),
    _keep("negative", "x < 0", "keep the negative numbers", "discard zeros and positive values"),
    _each("add", "x + {n}", "add {n} to each number", "increase every element by {n}"),
    _each("subtract", "x - {n}", "subtract {n} from each number", "decrease every element by {n}"),
    _each("multiply", "x * {n}", "multiply each number by {n}", "scale every element by {n}", divisor=True),
    _each("modulo", "x % {n}", "take each number modulo {n}", "take remainders of division by {n}", divisor=True),
    _each("divide", "x // {n}", "floor divide each number by {n}", "take integer quotients by {n}", divisor=True),
    _each("square", "x * x", "square each number", "multiply every element by itself"),
    _each("negate", "-x", "negate each number", "flip the sign of every element"),
    _each("absolute", "abs(x)", "take absolute values", "drop the sign of every element"),
    _each("cap", "min(x, {n})", "cap each number at {n}", "limit every element to a maximum of {n}"),
    _each("raise", "max(x, {n})", "raise each number to at least {n}", "limit every element to a minimum of {n}"),
    _each("even_times", "x * {n} if x % 2 == 0 else x", "multiply even numbers by {n}", "scale only the even ones by {n}"),
    _each("odd_plus", "x + {n} if x % 2 == 1 else x", "add {n} to odd numbers", "increase only the odd ones by {n}"),
    # a list as a whole
    _step("ascending", "list>list", "sorted({v})", "sort in ascending order", "arrange from smallest to largest"),
    _step("descending", "list>list", "sorted({v}, reverse=True)", "sort in descending order", "arrange from largest to smallest"),
    _step("reverse", "list>list", "{v}[::-1]", "reverse the list", "put the elements in the opposite order"),
    _step("distinct", "list>list", "sorted(set({v}))", "sort the distinct numbers", "remove duplicates and sort"),
    _step("head", "list>list", "{v}[:{k}]", "take the first {k} elements", "keep just the leading {k} items"),
    _step("skip", "list>list", "{v}[{k}:]", "skip the first {k} elements", "drop the leading {k} items"),
    _step("tail", "list>list", "{v}[-{k}:]", "take the last {k} elements", "keep just the trailing {k} items"),
    _step("alternate", "list>list", "{v}[::2]", "take every second element", "keep the elements at even positions"),
    _step("differences", "list>list", "[b - a for a, b in zip({v}, {v}[1:])]", "take differences", "subtract neighbours"),
    _step("sum", "list>number", "sum({v})", "compute the sum", "add everything up", "find the total"),
    _step("maximum", "list>number", "max({v}, default=0)", "find the maximum", "pick the largest value"),
    _step("minimum", "list>number", "min({v}, default=0)", "find the minimum", "pick the smallest value"),
    _step("size", "list>number", "len({v})", "count the elements", "find how many items there are"),
    _step("kinds", "list>number", "len(set({v}))", "count the distinct elements", "find how many different items there are"),
    _step("squares", "list>number", "sum(x * x for x in {v})", "compute the sum of squares", "add up the squares"),
    _step("equal", "list>number", "{v}.count({n})", "count how many equal {n}", "find how often {n} occurs"),
    _step("exceed", "list>number", "sum(1 for x in {v} if x > {n})", "count how many exceed {n}", "count the values above {n}"),
    _step("product", "list>number", "{out} = 1\nfor x in {v}:\n    {out} = {out} * x", "compute the product", "multiply everything"),
    _step("glue", "list>text", "'{p}'.join(str(x) for x in {v})", "join as text with '{p}'", "build a string separated by '{p}'"),
    _step("tally", "list>counts", "{out} = {{}}\nfor x in {v}:\n    {out}[x] = {out}.get(x, 0) + 1", "tally the values", "map every value to its frequency"),
    _step("any", "list>truth", "any(x > {n} for x in {v})", "check whether any exceeds {n}", "tell if some value is above {n}"),
    _step("all", "list>truth", "all(x > {n} for x in {v})", "check whether all exceed {n}", "tell if every value is above {n}"),
    # numbers
    _step("plus", "number>number", "{v} + {n}", "add {n}", "increase it by {n}"),
    _step("minus", "number>number", "{v} - {n}", "subtract {n}", "decrease it by {n}"),
    _step("times", "number>number", "{v} * {n}", "multiply by {n}", "scale it by {n}", divisor=True),
    _step("quotient", "number>number", "{v} // {n}", "floor divide by {n}", "take the integer quotient by {n}", divisor=True),
    _step("remainder", "number>number", "{v} % {n}", "take it modulo {n}", "take the remainder of division by {n}", divisor=True),
    _step("squared", "number>number", "{v} * {v}", "square it", "multiply it by itself"),
    _step("magnitude", "number>number", "abs({v})", "take its absolute value", "drop its sign"),
    _step("digit_sum", "number>number", "sum(int(d) for d in str(abs({v})))", "sum its digits", "add up its decimal digits"),
    _step("digit_count", "number>number", "len(str(abs({v})))", "count its digits", "find how many decimal digits it has"),
    _step("digit_turn", "number>number", "int(str(abs({v}))[::-1])", "reverse its digits", "read its decimal digits backwards"),
    _step("clamp", "number>number", "max({n}, min({m}, {v}))", "clamp it to {n} and {m}", "restrict it to the range from {n} to {m}"),
    _step("limit", "number>number", "min({v}, {n})", "cap it at {n}", "limit it to a maximum of {n}"),
    _step(
        "collatz", "number>number", "if {v} % 2 == 0:\n    {out} = {v} // 2\nelse:\n    {out} = {v} * {n} + 1",
        "halve it if even, else multiply by {n} and add 1", "divide by 2 when even, otherwise times {n} plus 1", divisor=True,
    ),
    _step(
        "branch", "number>number", "if {v} > {n}:\n    {out} = {v} - {m}\nelse:\n    {out} = {v} + {m}",
        "subtract {m} if above {n}, else add {m}", "when it exceeds {n} decrease it by {m}, otherwise increase it by {m}",
    ),
    _step(
        "loop", "number>number", "{out} = {v}\nfor i in range({k}):\n    {out} = {out} * 2 + 1",
        "double it and add 1, {k} times", "repeat {k} times: double it and add 1",
    ),
    _step("triangle", "number>number", "sum(range(1, {v} + 1))", "sum the integers from 1 to it", "add up 1 to it", first=True),
    _step("digits", "number>list", "[int(d) for d in str(abs({v}))]", "list its digits", "split it into decimal digits"),
    _step("range", "number>list", "list(range(1, {v} + 1))", "list the integers from 1 to it", "make a list of 1 up to it", first=True),
    _step("divisors", "number>list", "[i for i in range(1, {v} + 1) if {v} % i == 0]", "list its divisors", "collect what divides it", first=True),
    _step("decimal", "number>text", "str({v})", "convert it to a string", "turn it into text"),
    _step("binary", "number>text", "bin(abs({v}))[2:]", "convert it to binary text", "write it in base 2"),
    _step("is_even", "number>truth", "{v} % 2 == 0", "check whether it is even", "tell if 2 divides it"),
    _step("is_above", "number>truth", "{v} > {n}", "check whether it exceeds {n}", "tell if it is above {n}"),
    # text
    _step("upper", "text>text", "{v}.upper()", "convert to upper case", "make all letters capital"),
    _step("lower", "text>text", "{v}.lower()", "convert to lower case", "make all letters small"),
    _step("swap", "text>text", "{v}.swapcase()", "swap the case", "toggle upper and lower case"),
    _step("backwards", "text>text", "{v}[::-1]", "reverse the string", "write the characters backwards"),
    _step("alphabetic", "text>text", "''.join(sorted({v}))", "sort the characters", "arrange the characters in order"),
    _step("stretch", "text>text", "''.join(c * {k} for c in {v})", "repeat each character {k} times", "write every character {k} times"),
    _step("replace", "text>text", "{v}.replace('{a}', '{b}')", "replace '{a}' with '{b}'", "change every '{a}' into '{b}'"),
    _step("remove", "text>text", "{v}.replace('{a}', '')", "remove the letter '{a}'", "delete every '{a}'"),
    _step("dense", "text>text", "{v}.replace(' ', '')", "remove the spaces", "delete every space"),
    _letters("vowels", "c in 'aeiouAEIOU'", "keep only vowels", "discard everything except vowels"),
    _letters("consonants", "c not in 'aeiouAEIOU'", "remove the vowels", "discard all vowels"),
    _letters("digits", "c.isdigit()", "keep only digits", "discard everything except digits"),
    _letters("letters", "c.isalpha()", "keep only letters", "discard everything except letters"),
    _letters("capitals", "c.isupper()", "keep only capitals", "discard everything except upper case letters"),
    _step("start", "text>text", "{v}[:{k}]", "take the first {k} characters", "keep just the leading {k} characters"),
    _step("end", "text>text", "{v}[-{k}:]", "take the last {k} characters", "keep just the trailing {k} characters"),
    _step("thin", "text>text", "{v}[::2]", "take every second character", "keep the characters at even positions"),
    _step("copies", "text>text", "{v} * {k}", "repeat the string {k} times", "concatenate {k} copies"),
    _step("prefix", "text>text", "'{a}' + {v}", "put '{a}' in front", "prepend '{a}'"),
    _step("suffix", "text>text", "{v} + '{a}'", "put '{a}' at the end", "append '{a}'"),
    _step("length", "text>number", "len({v})", "find the length", "count the characters"),
    _step("letter_count", "text>number", "{v}.count('{a}')", "count the letter '{a}'", "find how often '{a}' occurs"),
    _step("vowel_count", "text>number", "sum(1 for c in {v} if c in 'aeiouAEIOU')", "count the vowels", "find how many vowels there are"),
    _step("digit_chars", "text>number", "sum(1 for c in {v} if c.isdigit())", "count the digits", "find how many digits there are"),
    _step("char_kinds", "text>number", "len(set({v}))", "count the distinct characters", "find how many different characters there are"),
    _step("split", "text>words", "{v}.split()", "split into words", "break it at whitespace"),
    _step("palindrome", "text>truth", "{v} == {v}[::-1]", "check whether it is a palindrome", "tell if it reads the same backwards"),
    _step("char_tally", "text>counts", "{out} = {{}}\nfor c in {v}:\n    {out}[c] = {out}.get(c, 0) + 1", "tally the characters", "map every character to its frequency"),
    # words
    _words("longer", "len(w) > {k}", "keep words longer than {k}", "retain words of more than {k} characters"),
    _words("shorter", "len(w) < {k}", "keep words shorter than {k}", "retain words of fewer than {k} characters"),
    _words("with", "'{a}' in w", "keep words containing '{a}'", "retain words with the letter '{a}'"),
    _words("without", "'{a}' not in w", "remove words containing '{a}'", "retain words without the letter '{a}'"),
    _words("even", "len(w) % 2 == 0", "keep words of even length", "discard words of odd length"),
    _step("words_upper", "words>words", "[w.upper() for w in {v}]", "convert each word to upper case", "make every word all capitals"),
    _step("words_title", "words>words", "[w.capitalize() for w in {v}]", "capitalize each word", "start every word with a capital"),
    _step("words_backwards", "words>words", "[w[::-1] for w in {v}]", "reverse each word", "spell every word backwards"),
    _step("words_cut", "words>words", "[w[:{k}] for w in {v}]", "cut each word to {k} characters", "shorten every word to {k} characters"),
    _step("words_suffix", "words>words", "[w + '{a}' for w in {v}]", "append '{a}' to each word", "add '{a}' to the end of every word"),
    _step("words_sort", "words>words", "sorted({v})", "sort the words alphabetically", "arrange the words in order"),
    _step("words_by_length", "words>words", "sorted({v}, key=len)", "sort the words by length", "arrange the words from shortest to longest"),
    _step("words_reverse", "words>words", "{v}[::-1]", "reverse the word order", "put the words in the opposite order"),
    _step("words_head", "words>words", "{v}[:{k}]", "take the first {k} words", "keep just the leading {k} words"),
    _step("words_distinct", "words>words", "sorted(set({v}))", "sort the distinct words", "remove duplicate words and sort"),
    _step("words_join", "words>text", "'{p}'.join({v})", "join the words with '{p}'", "glue the words together using '{p}'"),
    _step("initials", "words>text", "''.join(w[0] for w in {v})", "join the first letters", "build a string of the initials"),
    _step("longest", "words>text", "max({v}, key=len, default='')", "find the longest word", "pick the word with most characters"),
    _step("word_count", "words>number", "len({v})", "count the words", "find how many words there are"),
    _step("total_length", "words>number", "sum(len(w) for w in {v})", "compute the total length", "add up the lengths of the words"),
    _step("lengths", "words>list", "[len(w) for w in {v}]", "list the word lengths", "replace every word by its length"),
    _step("word_tally", "words>counts", "{out} = {{}}\nfor w in {v}:\n    {out}[w] = {out}.get(w, 0) + 1", "tally the words", "map every word to its frequency"),
    _step("word_lengths", "words>counts", "{{w: len(w) for w in {v}}}", "map each word to its length", "build a dictionary of word lengths"),
    # dictionaries
    _step("key_count", "counts>number", "len({v})", "count the keys", "find how many keys it has"),
    _step("top_value", "counts>number", "max({v}.values(), default=0)", "find the largest value", "pick the highest stored value"),
    _step("value_sum", "counts>number", "sum({v}.values())", "sum the values", "add up all stored values"),
    _step("repeated", "counts>counts", "{{k: x for k, x in {v}.items() if x > 1}}", "keep values above 1", "drop keys whose value is 1 or less"),
    _step("values", "counts>list", "sorted({v}.values())", "list the sorted values", "collect the values in ascending order"),
)  # fmt: skip

BY_NAME = {step.name: step for step in STEPS}
BY_KIND = {kind: tuple(step for step in STEPS if step.takes == kind) for kind in (*KINDS, "counts", "truth")}
